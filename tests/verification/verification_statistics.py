"""A chi-square test without SciPy, and trials of verification with fixed seeds."""

from __future__ import annotations

import torch

from gemma4_kernels import sample_tokens, verify_drafts

TRIALS = 200_000
REJECT_BELOW = 1e-6
"""Seeds are fixed, so a test that passes passes always; a defect worth the name is far below this."""


def chi_square_p(counts, probabilities):
    """The probability of counts (N,) at least so far from probabilities (N,). Bins that expect under 5 are pooled."""
    expected = probabilities.double() * counts.sum()
    assert int(counts[probabilities == 0].sum()) == 0, "a token without probability was drawn"
    rare = expected < 5
    if bool(rare.any()):
        counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
        expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
        counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2)) if len(expected) > 1 else 1.0


def histogram(tokens, size):
    return torch.bincount(tokens, minlength=size).double()


def draft(draft_logits, seeds, position=0, stream="draft", **filters):
    """Drafts (TRIALS, K), sampled from draft_logits (K, V)."""
    rows = [
        sample_tokens(row.expand(len(seeds), -1), seeds=seeds, positions=position + i, stream=stream, **filters)
        for i, row in enumerate(draft_logits)
    ]
    return torch.stack(rows, dim=1)


def trials(target_of, draft_logits, drafts, seeds, method, told=True, **filters):
    """Verify drafts (TRIALS, K). target_of maps a number of drafts and the last of them, (TRIALS,), to logits (TRIALS, V)
    or (V,): the target's answer may depend on the draft before it."""
    k = drafts.shape[1]
    rows = [target_of(row, drafts[:, row - 1] if row else None) for row in range(k + 1)]
    logits = torch.stack([row.expand(len(drafts), -1) for row in rows], dim=1)
    if method == "match" or not told:
        draft_logits = None
    else:
        draft_logits = draft_logits.expand(len(drafts), -1, -1)
    return verify_drafts(logits, drafts, method=method, draft_logits=draft_logits, seeds=seeds, positions=0, **filters)
