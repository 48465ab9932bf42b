"""The cache: values alone are enough on K = V layers, and forgetting rows is exact."""

from __future__ import annotations

import pytest
import torch
from small_models import WINDOW, assert_same_logits, random_ids

from gemma4_kernels.reference import ReferenceCache, ReferenceModel


def test_values_alone_give_the_same_logits(text: ReferenceModel) -> None:
    ids = random_ids(2, 3 * WINDOW)
    both, values_only = ReferenceCache(), ReferenceCache(values_only=True)
    for chunk in ids.split([20, 1, 4, 11], dim=1):
        assert_same_logits(text.logits(chunk, past_key_values=values_only), text.logits(chunk, past_key_values=both))
    full_layer = text.config.layers.index("full")
    assert full_layer in both.keys
    assert full_layer not in values_only.keys
    assert set(values_only.values) == set(range(len(text.config.layers)))


def test_values_alone_keep_the_positions_of_a_padded_batch(text: ReferenceModel) -> None:
    ids = random_ids(2, 16)
    mask = (torch.arange(16) >= torch.tensor([[0], [6]])).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    both, values_only = ReferenceCache(), ReferenceCache(values_only=True)
    for cache in (both, values_only):
        text.logits(ids[:, :12], attention_mask=mask[:, :12], position_ids=positions[:, :12], past_key_values=cache)
    rest = {"input_ids": ids[:, 12:], "attention_mask": mask, "position_ids": positions[:, 12:]}
    assert_same_logits(text.logits(**rest, past_key_values=values_only), text.logits(**rest, past_key_values=both))


@pytest.mark.parametrize("values_only", [False, True])
def test_truncated_rows_leave_no_trace(text: ReferenceModel, values_only: bool) -> None:
    ids, rejected = random_ids(1, 30), random_ids(1, 8, seed=1)
    clean, used = ReferenceCache(values_only=values_only), ReferenceCache(values_only=values_only)
    for cache in (clean, used):
        text.logits(ids[:, :20], past_key_values=cache)
    text.logits(rejected, past_key_values=used)
    used.truncate(20)
    assert used.length == 20
    assert torch.equal(text.logits(ids[:, 20:], past_key_values=used), text.logits(ids[:, 20:], past_key_values=clean))


def test_truncate_refuses_a_length_it_does_not_have(text: ReferenceModel) -> None:
    cache = ReferenceCache()
    text.logits(random_ids(1, 5), past_key_values=cache)
    with pytest.raises(ValueError, match="length: expected 0 to 5, the tokens in the cache, got 6"):
        cache.truncate(6)


def test_another_batch_size_is_refused(text: ReferenceModel) -> None:
    cache = ReferenceCache()
    text.logits(random_ids(1, 5), past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values: holds 1 rows, the input has 2"):
        text.logits(random_ids(2, 5), past_key_values=cache)
