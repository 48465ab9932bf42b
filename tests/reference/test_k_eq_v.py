"""Keys rebuilt from values, and attention that never forms them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import HIDDEN, randn
from torch import Tensor

from gemma4_kernels.reference import (
    flash_attention,
    k_eq_v_attention,
    k_eq_v_from_values_alone,
    keys_from_values,
    plain_k_eq_v_attention,
    proportional_inv_freq,
    rms_norm,
)

TRUE_FREQUENCIES = proportional_inv_freq(512, 1e6, 0.25)
SCATTERED = torch.zeros(8).index_fill(0, torch.tensor([1, 4, 7]), 0.3)
ALL_TURN = torch.linspace(0.01, 1.0, 8)
NONE_TURN = torch.zeros(8)


def inputs(head_dim: int, num_queries: int = 3, num_kv_heads: int = 1, dtype: torch.dtype = torch.float32) -> Any:
    """q of unit rms, values as v_norm makes them, a k_norm weight around 0.12."""
    q = rms_norm(randn(2, num_queries, 16, head_dim, seed=1))
    values = rms_norm(randn(2, 40, num_kv_heads, head_dim, seed=2))
    weight = 0.12 + 0.03 * randn(head_dim, seed=3)
    return q.to(dtype), values.to(dtype), weight.to(dtype)


@pytest.mark.parametrize("num_kv_heads", [1, 2])
@pytest.mark.parametrize("inv_freq", [TRUE_FREQUENCIES, SCATTERED, ALL_TURN, NONE_TURN])
def test_both_ways_agree_in_float64(inv_freq: Tensor, num_kv_heads: int) -> None:
    q, values, weight = inputs(2 * len(inv_freq), num_kv_heads=num_kv_heads)
    key_lengths = torch.tensor([40, 17])
    out, lse = k_eq_v_attention(q, values, weight, inv_freq, key_lengths=key_lengths)
    other, other_lse = k_eq_v_from_values_alone(q, values, weight, inv_freq, key_lengths=key_lengths)
    assert float((out - other).abs().max()) < 1e-12
    assert float((lse - other_lse).abs().max()) < 1e-12


def test_keys_are_those_of_a_full_layer_of_transformers(hf_text: Any) -> None:
    layer = hf_text.model.layers[5].self_attn
    hidden, positions = randn(2, 9, HIDDEN), torch.arange(100, 109)[None]
    cos, sin = hf_text.model.rotary_emb(hidden, positions, "full_attention")
    cached: dict[str, Any] = {}
    layer.store_full_length_kv = True
    layer(hidden, (cos, sin), None, cached)
    layer.store_full_length_kv = False
    keys, values = (rows.transpose(1, 2) for rows in cached["full_attention"])
    ours = keys_from_values(values, layer.k_norm.weight, TRUE_FREQUENCIES, positions)
    assert float((ours - keys).abs().max()) < 1e-6


def test_k_eq_v_attention_is_causal_flash_attention_on_the_keys() -> None:
    q, values, weight = inputs(512)
    keys = keys_from_values(values.double(), weight, TRUE_FREQUENCIES, torch.arange(40))
    key_lengths = torch.tensor([40, 2])
    expected = flash_attention(q, keys, values, softmax_scale=0.7, causal=True, key_lengths=key_lengths)
    got = k_eq_v_attention(q, values, weight, TRUE_FREQUENCIES, softmax_scale=0.7, key_lengths=key_lengths)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("function", [k_eq_v_attention, k_eq_v_from_values_alone, plain_k_eq_v_attention])
def test_rows_that_see_nothing_are_zero(function: Any) -> None:
    q, values, weight = inputs(16)
    out, lse = function(q, values, weight, ALL_TURN, key_lengths=torch.tensor([2, 0]))
    assert not out.isnan().any()
    assert (out[0, 0] == 0).all()
    assert (out[0, 1] != 0).any()
    assert (out[1] == 0).all()
    assert (lse[1] == -torch.inf).all()


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 6e-2), (torch.float32, 1e-5)])
def test_plain_attention_is_off_by_its_own_dtype_only(dtype: torch.dtype, limit: float) -> None:
    q, values, weight = inputs(512, dtype=dtype)
    out, lse = plain_k_eq_v_attention(q, values, weight, TRUE_FREQUENCIES)
    exact, exact_lse = k_eq_v_attention(q, values, weight, TRUE_FREQUENCIES)
    assert out.dtype == dtype
    assert 0 < float((out - exact).abs().max()) < limit
    assert 0 < float((lse - exact_lse).abs().max()) < limit


def test_a_lower_dtype_is_rounded_at_the_end_only() -> None:
    q, values, weight = inputs(512, dtype=torch.bfloat16)
    exact, _ = k_eq_v_attention(q, values, weight, TRUE_FREQUENCIES)
    rounded, _ = k_eq_v_attention(q, values, weight, TRUE_FREQUENCIES, dtype=torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert float((rounded - exact).abs().max()) <= float(exact.abs().max()) * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.zeros(2, 3, 16, 8)}, ValueError, "q: expected"),
        ({"q": torch.zeros(2, 3, 16, 16, dtype=torch.int32)}, TypeError, "q: expected a floating dtype"),
        ({"values": torch.zeros(2, 40, 16)}, ValueError, "values: expected"),
        ({"values": torch.zeros(2, 40, 3, 16)}, ValueError, "q: expected a multiple of the 3 heads of values, got 16"),
        ({"k_norm_weight": torch.zeros(8)}, ValueError, r"k_norm_weight: expected shape \(16,\)"),
        ({"inv_freq": torch.zeros(16)}, ValueError, r"inv_freq: expected shape \(8,\)"),
        ({"key_lengths": torch.tensor([41, 0])}, ValueError, "key_lengths: expected 0 to 40"),
    ],
)
def test_bad_input_is_refused_by_name(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    q, values, weight = inputs(16)
    arguments = {"q": q, "values": values, "k_norm_weight": weight, "inv_freq": ALL_TURN, **changes}
    for function in (k_eq_v_attention, k_eq_v_from_values_alone, plain_k_eq_v_attention):
        with pytest.raises(error, match=message):
            function(**arguments)


def test_positions_of_the_wrong_length_are_refused() -> None:
    _, values, weight = inputs(16)
    with pytest.raises(ValueError, match="positions: expected"):
        keys_from_values(values, weight, ALL_TURN, torch.arange(39))
