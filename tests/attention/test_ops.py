"""The ops as PyTorch sees them: schemas, fakes, torch.compile, accelerators without a sync."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchgen
import yaml
from torch.utils._python_dispatch import TorchDispatchMode

from gemma4_kernels import flash_attn_func, flash_attn_with_kvcache, k_eq_v_attention
from gemma4_kernels.attention import api, eager, ops
from gemma4_kernels.bench import inputs as draw
from gemma4_kernels.bench.cases import AttentionCase, attention_cases

CALLS = {
    "flash_attn": AttentionCase(
        "flash_attn_func", b=2, sq=20, sk=40, hq=4, hkv=2, d=32, left=9, right=0, blocks="3-30"
    ),
    "flash_attn_varlen": AttentionCase(
        "flash_attn_varlen_func", lengths="3:7+20:20", hq=4, hkv=2, d=32, right=0, page=8
    ),
    "flash_attn_kvcache": AttentionCase(
        "flash_attn_with_kvcache", sq=3, lengths="7+20", hq=4, hkv=2, d=32, right=0, page=8
    ),
    "k_eq_v_attention": AttentionCase("k_eq_v_attention", sq=3, lengths="7+20", hq=4, hkv=1, d=32, page=8),
}

OP_OF = {
    "flash_attn_func": "flash_attn",
    "flash_attn_varlen_func": "flash_attn_varlen",
    "flash_attn_with_kvcache": "flash_attn_kvcache",
    "k_eq_v_attention": "k_eq_v_attention",
}


def plan(case: AttentionCase, device: str = "cpu") -> api.Plan:
    function = getattr(api, case.op)
    made = {
        name: value.nan_to_num() if torch.is_tensor(value) and value.dtype != torch.float8_e4m3fn else value
        for name, value in case.inputs().items()
    }
    return function.__wrapped__(**{n: v.to(device) if torch.is_tensor(v) else v for n, v in made.items()})


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_opcheck(op, dtype):
    torch.library.opcheck(
        getattr(torch.ops.gemma4_kernels, op).default, plan(replace(CALLS[op], dtype=dtype)).arguments
    )


@pytest.mark.parametrize("paged", [False, True])
def test_opcheck_append(paged):
    q, cache, new = torch.randn(2, 3, 2, 32), torch.zeros(4, 8, 2, 32), torch.randn(2, 3, 2, 32)
    table = torch.tensor([[3, 1], [0, 2]]) if paged else None
    entry = None if paged else torch.tensor([3, 1])
    arguments = (q, cache, cache.clone(), new, new.clone(), torch.tensor([5, 1]), None, entry, table, None)
    torch.library.opcheck(
        torch.ops.gemma4_kernels.flash_attn_kvcache_append.default, (*arguments, 1.0, 0.0, -1, 0, True, 0)
    )


def test_every_op_is_covered_here():
    assert set(CALLS) | {"flash_attn_kvcache_append"} == set(ops.SCHEMAS)


def test_compile_with_a_scale_that_changes():
    """From the second value on, the scale is a symbol."""
    q, k = torch.randn(1, 3, 2, 16), torch.randn(1, 5, 2, 16)
    compiled = torch.compile(
        lambda scale, cap: flash_attn_func(q, k, k, scale, True, softcap=cap), fullgraph=True, backend="aot_eager"
    )
    for scale in (1.0, 0.5, 0.25):
        assert torch.equal(compiled(scale, 2 * scale), flash_attn_func(q, k, k, scale, True, softcap=2 * scale))


@pytest.mark.parametrize("op", CALLS)
def test_autocast_changes_nothing(op):
    """Inside, products are fp32 whatever autocast does to the model around."""
    made = replace(CALLS[op], dtype="fp32").inputs()
    function = getattr(api, CALLS[op].op)
    expected = function(**made)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(function(**made), expected)


def test_compile_without_a_graph_break():
    """A layer's worth of calls in one graph, the same bits as outside of it, shapes that change included."""

    def layer(q, k_cache, v_cache, k, v, lengths, values, weight, inv_freq):
        a = flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens=lengths, softmax_scale=1.0, window_size=(9, 0)
        )
        b = k_eq_v_attention(q, values, weight, inv_freq, cache_seqlens=lengths)
        c, lse = flash_attn_func(q, k_cache, v_cache, causal=True, return_lse=True)
        return a + b + c, lse

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (1, 3, 5):
        rng = draw.generator(rows)
        q, k, v = (
            draw.queries((2, rows, 4, 32), rng),
            draw.keys((2, rows, 1, 32), rng),
            draw.values((2, rows, 1, 32), rng),
        )
        cache = draw.values((2, 30, 1, 32), rng)
        lengths = torch.tensor([7, 20], dtype=torch.int32)
        arguments = (k, v, lengths, cache, draw.k_norm_weight(32, rng), draw.inv_freq(32))
        plain_k, plain_v, compiled_k, compiled_v = (cache.clone() for _ in range(4))
        expected = layer(q, plain_k, plain_v, *arguments)
        got = compiled(q, compiled_k, compiled_v, *arguments)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
        assert torch.equal(compiled_k, plain_k)
        assert torch.equal(compiled_v, plain_v)


def test_a_forward_works_outside_no_grad_and_its_backward_says_why_not():
    q, k = torch.randn(1, 3, 2, 16, requires_grad=True), torch.randn(1, 5, 2, 16)
    out = flash_attn_func(q, k, k)
    with pytest.raises(NotImplementedError, match="inference"):
        out.sum().backward()


# An accelerator, as far as a machine without one can tell ---------------------------------------------------------------
#
# The eager backend branches on "CPU or not". Tensors on the meta device take the other branch and hold no numbers, so
# anything that would read one from the device raises; a recorder sees every ATen op on the way.


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.name())
        out = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.dtypes.add(leaf.dtype)
        return out


def native_functions() -> dict[str, dict]:
    """ "aten::name.overload" -> its entry in the list of ops that PyTorch is built from."""
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    with path.open() as file:
        entries = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return {f"aten::{entry['func'].split('(')[0]}": entry for entry in entries}


# What a view or a composite of other ops needs from a device is nothing; these have an implementation for each device.
_ANY_DEVICE = ("CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional", "CompositeImplicitAutograd")


def has_mps_kernel(name: str, entries: dict[str, dict]) -> bool:
    entry = entries[name]
    if "structured_delegate" in entry:  # implemented by its out variant
        name = f"aten::{entry['structured_delegate']}"
        entry = entries[name]
    dispatch = entry.get("dispatch")
    if dispatch is None:  # composite without a dispatch table
        return True
    keys = {key.strip() for line in dispatch for key in line.split(",")}
    return "MPS" in keys or any(key in keys for key in _ANY_DEVICE)


SYNCS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "bincount")


# Decoding in several chunks, on one KV head and on more.
LONG = [
    AttentionCase("k_eq_v_attention", sk=5000, hq=4, hkv=1, d=32),
    AttentionCase("k_eq_v_attention", sk=5000, hq=4, hkv=2, d=32),
    AttentionCase("flash_attn_func", sk=5000, hq=4, hkv=1, d=32, right=0),
]


@pytest.fixture(scope="module")
def recorded() -> Recorder:
    recorder = Recorder()
    cases = [case for case in attention_cases() if case.dtype == "bf16" and case.sk < 2000]
    for case in [*CALLS.values(), *cases, *LONG]:
        arguments, _, append = plan(case, "meta")
        with recorder:
            getattr(eager, OP_OF[case.op])(*arguments)
            if append is not None:
                _, k_cache, v_cache, lengths, _, entries, table, *_ = arguments
                eager.append_kv(k_cache, v_cache, *append, lengths, entries, table)
    return recorder


def test_eager_uses_only_ops_that_mps_has(recorded):
    entries = native_functions()
    missing = sorted(name for name in recorded.seen if name.startswith("aten::") and not has_mps_kernel(name, entries))
    assert not missing, f"no MPS entry for {missing}"
    assert len(recorded.seen) > 30  # the recorder did see the kernels


def test_eager_never_reads_a_number_from_the_device(recorded):
    syncs = sorted(name for name in recorded.seen if name.split("::")[1].split(".")[0] in SYNCS)
    assert not syncs


def test_eager_stays_clear_of_fp64_and_complex_numbers(recorded):
    assert not {dtype for dtype in recorded.dtypes if dtype == torch.float64 or dtype.is_complex}


def test_the_mps_check_can_fail():
    entries = native_functions()
    assert has_mps_kernel("aten::bmm", entries)
    assert not has_mps_kernel("aten::_weight_int4pack_mm_for_cpu", entries)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros(2, device="meta").nonzero()


def test_a_block_that_a_device_knows_lifts_only_the_right_edge():
    """Tiles left of the window are not computed, wherever the block ids are."""
    request = eager.Request(
        query_start=7900, key_start=0, key_end=8000, capacity=8000, left=1023, right=0,
        block_ids=torch.zeros(8000, dtype=torch.int32, device="meta"),
    )  # fmt: skip
    assert request.key_range(0, 99) == (7900 - 1023, 8000)


# A device whose numbers the host does not know must give what the CPU gives with the numbers known.


@pytest.mark.parametrize("case", [case for case in attention_cases() if case.lengths], ids=str)
def test_lengths_on_a_device_give_the_same_result(case, monkeypatch):
    arguments = plan(case).arguments
    function = getattr(eager, OP_OF[case.op])
    expected = function(*arguments)
    monkeypatch.setattr(eager, "_host", lambda numbers: numbers.long())
    for got, want in zip(function(*arguments), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1.6e-2, atol=1e-3)
