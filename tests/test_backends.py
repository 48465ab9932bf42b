"""The dispatcher: what it takes, what it refuses, and what it says of both."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from backend_helpers import standing_in

from gemma4_kernels import BackendError, backends, explain, flash_attn_func, use_backend
from gemma4_kernels.backends import Call, Implementation

calls: list[str] = []


def recording_flash_attn(q, k, v, *_):
    calls.append("triton")
    batch, rows, heads, _dim = q.shape
    return q.clone(), q.new_zeros((batch, heads, rows), dtype=torch.float32)


@pytest.fixture
def triton():
    """A stand-in of the triton backend: bf16 only, head_dim to 64, no image blocks."""
    stand_in = Implementation(
        op="flash_attn",
        backend="triton",
        entry=f"{__name__}:recording_flash_attn",
        dtypes=frozenset({torch.bfloat16}),
        features=frozenset({"window"}),
        device_types=frozenset({"cpu"}),
        max_head_dim=64,
    )
    calls.clear()
    backends._logged.clear()
    with standing_in(stand_in):
        yield


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv("GEMMA4_BACKEND", raising=False)


def qkv(dtype=torch.bfloat16, dim=64, rows=2):
    return tuple(torch.zeros(1, rows, 1, dim, dtype=dtype) for _ in range(3))


def test_the_first_backend_in_order_that_can_is_taken(triton):
    flash_attn_func(*qkv())
    assert calls == ["triton"]
    assert explain("flash_attn_func", **dict(zip("qkv", qkv(), strict=True))).taken == "triton"


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"dtype": torch.float32}, "takes bfloat16, not float32"),
        ({"dim": 128}, "head_dim goes to 64, the call has 128"),
    ],
)
def test_a_refusal_has_a_reason_and_the_next_backend_serves(triton, call, reason):
    flash_attn_func(*qkv(**call))
    assert calls == []
    explanation = explain("flash_attn_func", **dict(zip("qkv", qkv(**call), strict=True)))
    assert explanation.taken == "eager"
    assert {choice.backend: choice.reason for choice in explanation.choices}["triton"] == reason


def test_a_missing_feature_is_named(triton):
    q, k, v = qkv()
    explanation = explain("flash_attn_func", q=q, k=k, v=v, block_ids=torch.zeros(1, 2, dtype=torch.int32), softcap=1.0)
    assert "triton  does not support block_ids, softcap" in str(explanation)


def test_a_backend_asked_for_by_name_never_falls_back(triton):
    with use_backend("triton"), pytest.raises(BackendError, match="takes bfloat16, not float32"):
        flash_attn_func(*qkv(dtype=torch.float32))
    with use_backend("cuda"), pytest.raises(BackendError, match="runs on cuda, not on cpu"):
        flash_attn_func(*qkv())


def test_use_backend_overrides_the_order_and_ends_with_its_block(triton):
    with use_backend("eager"):
        flash_attn_func(*qkv())
    assert calls == []
    flash_attn_func(*qkv())
    assert calls == ["triton"]


def test_the_variable_chooses_and_use_backend_overrides_it(triton, monkeypatch):
    monkeypatch.setenv("GEMMA4_BACKEND", "eager")
    flash_attn_func(*qkv())
    assert calls == []
    with use_backend("auto"):
        flash_attn_func(*qkv())
    assert calls == ["triton"]
    monkeypatch.setenv("GEMMA4_BACKEND", "trition")
    with pytest.raises(ValueError, match=r"GEMMA4_BACKEND must be one of cuda, triton, eager, auto, got 'trition'"):
        flash_attn_func(*qkv())


def test_use_backend_refuses_an_unknown_name():
    with pytest.raises(ValueError, match="use_backend: name must be one of"), use_backend("metal"):
        pass


def test_one_log_line_for_each_op_and_shape_class(triton, caplog):
    with caplog.at_level(logging.INFO, logger="gemma4_kernels"):
        for _ in range(3):
            flash_attn_func(*qkv())
        flash_attn_func(*qkv(rows=40))
        flash_attn_func(*qkv(rows=50))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert "decode, head_dim 64" in lines[0]
    assert "-> triton" in lines[0]
    assert "prefill, head_dim 64" in lines[1]


def test_what_the_machine_lacks_is_a_reason():
    lacking = Implementation(
        op="flash_attn", backend="triton", entry="nowhere:nothing", dtypes=frozenset({torch.bfloat16}),
        features=frozenset(), missing=lambda: "triton is not installed",
    )  # fmt: skip
    with standing_in(lacking):
        assert "triton  triton is not installed" in str(explain("flash_attn_func", dtype=torch.bfloat16))
        flash_attn_func(*qkv())  # eager serves it


def test_explain_takes_needs_instead_of_tensors():
    explanation = explain(
        "k_eq_v_attention", device_type="cuda", architecture="sm_86", head_dim=512, features=["paged"]
    )
    assert explanation.call == Call(
        op="k_eq_v_attention", device_type="cuda", architecture="sm_86", head_dim=512, features=frozenset({"paged"})
    )
    assert explanation.taken == "triton"
    assert "sm_86" in str(explanation)


def test_what_is_served_is_said_where_a_call_has_no_shape():
    real = backends._implementations["flash_attn", "cuda"]
    with standing_in(replace(real, refuses=lambda call: None, only_by_name=lambda call: None)):
        said = str(explain("flash_attn_func", dtype=torch.bfloat16))
        assert "-> cuda    first in order that can: up to 16 rows of head_dim 64, 128, 256" in said
        assert "up to 16 rows" not in str(explain("flash_attn_func", **dict(zip("qkv", qkv(), strict=True))))


def test_explain_takes_the_device_type_for_the_architecture():
    assert str(explain("flash_attn_func", device_type="cuda")).startswith("flash_attn on cuda")


def test_explain_refuses_an_unknown_op_and_a_wrong_call():
    with pytest.raises(TypeError, match="features must be a collection of names, got 'window'"):
        explain("flash_attn_func", features="window")
    with pytest.raises(ValueError, match="explain: op must be one of flash_attn_func"):
        explain("flash_attention")
    with pytest.raises(ValueError, match="k must have shape"):
        explain("flash_attn_func", q=qkv()[0], k=torch.zeros(3), v=torch.zeros(3))


def test_explain_changes_no_cache():
    cache, new = torch.zeros(1, 8, 1, 16), torch.ones(1, 2, 1, 16)
    explain("flash_attn_with_kvcache", q=new, k_cache=cache, v_cache=cache, k=new, v=new, cache_seqlens=1)
    assert not cache.any()
