"""Strings that end a text, found in tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class StopStrings:
    """Where a text first contains one of some strings.

    Args:
        strings: none of them empty.
        tokenizer: anything with `decode(list of ids) -> str`.
    Raises: ValueError, TypeError.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Any) -> None:
        if isinstance(strings, str) or not all(isinstance(string, str) and string for string in strings):
            raise TypeError(f"generate: stop_strings must be a list of strings that are not empty, got {strings!r}")
        if strings and not hasattr(tokenizer, "decode"):
            raise ValueError(
                f"generate: tokenizer must be given with stop_strings, to decode, got {type(tokenizer).__name__}"
            )
        self.strings = tuple(strings)
        self.tokenizer = tokenizer
        # A token brings a byte at least; a few more for those that decode together with their neighbours.
        self._reach = max((len(string.encode()) for string in strings), default=0) + 4

    def cut(self, old: list[int], new: list[int]) -> int | None:
        """How many of the tokens `new`, behind the tokens `old` of the same answer, are there once a string is complete.

        None if there is none. Only what a new token takes part in counts.
        """
        if not self.strings:
            return None
        start = max(0, len(old) - self._reach)
        # A tokenizer whose tokens may be bytes makes nothing of a character that the tail cuts in two.
        while start > 0 and self.tokenizer.decode(old[start:]).startswith("\ufffd"):
            start = max(0, start - self._reach)
        tail = old[start:]
        before = self._count(tail)
        for number, token in enumerate(new, start=1):
            tail.append(token)
            if self._count(tail) > before:
                return number
        return None

    def _count(self, tokens: list[int]) -> int:
        text = self.tokenizer.decode(tokens) if tokens else ""
        return sum(text.count(string) for string in self.strings)
