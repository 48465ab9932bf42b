"""How many drafts a request asks for: always the same number, or as many as its text has deserved so far."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class AdaptiveLength:
    """Choose the number of drafts that promises the most tokens for the time of a round, request by request.

    If each draft is accepted with probability a once those before it are, k drafts promise 1 + a + ... + a^k tokens for
    the time 1 + k * draft_cost. a is estimated from the request's recent drafts. Where no draft pays, the request decodes
    plainly, and tries one draft again after `first_pause` tokens, then after twice as many, and so on.
    The choice depends on nothing but what has been accepted: no clock enters.
    """

    draft_cost: float = 0.08
    """Time of one more draft and of one more row to verify, as a share of a pass of the target over one row."""
    memory: float = 24.0
    """Drafts that the estimate remembers: older ones fade."""
    first_pause: int = 16
    last_pause: int = 128

    def __post_init__(self) -> None:
        for name, low in (("draft_cost", 0.0), ("memory", 1.0), ("first_pause", 1), ("last_pause", self.first_pause)):
            value = getattr(self, name)
            if not low <= value < float("inf"):
                raise ValueError(f"AdaptiveLength: {name} must be at least {low:g} and finite, got {value}")


@dataclass
class DraftLength:
    """The number of drafts of one request.

    Args:
        largest: never more than this.
        adaptive: None for always `largest`.
    """

    largest: int
    adaptive: AdaptiveLength | None = None
    # A stranger gets the benefit of the doubt: 4 accepted of 6.
    accepted: float = 4.0
    decided: float = 6.0
    pause: int = field(default=0)
    """Tokens of plain decoding until the next try."""
    next_pause: int = field(default=0)

    def wanted(self) -> int:
        """Drafts for the next round."""
        rule = self.adaptive
        if rule is None or self.largest == 0:
            return self.largest
        if self.pause > 0:
            return 0
        probability = self.accepted / self.decided
        tokens, best, wanted, reach = 1.0, 1.0, 0, 1.0
        for drafts in range(1, self.largest + 1):
            reach *= probability
            tokens += reach
            rate = tokens / (1.0 + drafts * rule.draft_cost)
            if rate > best:
                best, wanted = rate, drafts
        return max(wanted, 1)  # what has just come out of a pause tries one, whatever it promises

    def saw(self, offered: int, accepted: int, emitted: int) -> None:
        """Take note of a round: drafts offered and accepted, tokens emitted."""
        rule = self.adaptive
        if rule is None:
            return
        if offered == 0:
            self.pause = max(0, self.pause - emitted)
            return
        decisions = accepted + (accepted < offered)
        fade = (1.0 - 1.0 / rule.memory) ** decisions
        self.accepted = self.accepted * fade + accepted
        self.decided = self.decided * fade + decisions
        if accepted:
            self.next_pause = 0
        # One draft has to pay: 1 + a tokens for the time 1 + draft_cost.
        if self.accepted / self.decided < rule.draft_cost:
            self.next_pause = min(2 * self.next_pause, rule.last_pause) if self.next_pause else rule.first_pause
            self.pause = self.next_pause
