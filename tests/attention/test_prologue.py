"""Norms, rotation and append in one call: transformers' bits, in the right rows, and nothing else touched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from prologue_helpers import (
    DTYPES,
    GEMMA,
    KINDS,
    assert_rows_keep_their_bits_alone,
    full_layer,
    sliding_layer,
    with_exact_sums,
    written,
)

from gemma4_kernels import (
    BackendError,
    DeviceError,
    DTypeError,
    ShapeError,
    StrideError,
    explain,
    k_eq_v_attention,
    k_eq_v_norm_rope_append,
    qkv_norm_rope_append,
    use_backend,
)
from gemma4_kernels.bench import inputs as draw
from gemma4_kernels.reference.layers import apply_rope, rms_norm

kinds = pytest.mark.parametrize("kind", KINDS)


# The numbers --------------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("exact", [False, True])
def test_bits_of_transformers_modules(kind, dtype, exact):
    pytest.importorskip("transformers")
    layer = KINDS[kind](dtype, **GEMMA[kind])
    if exact:
        layer = with_exact_sums(layer)
    caches = layer.caches(8)
    out = layer.append(caches)
    q, rows = layer.expected()
    assert torch.equal(out, q)
    for got, want in zip(written(caches, layer), rows, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("layer_index", [0, 5], ids=["sliding", "full"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@torch.no_grad()
def test_bits_of_what_transformers_attention_hands_on(layer_index, dtype):
    """The query, keys and values that Gemma4UnifiedTextAttention gives to its attention function."""
    pytest.importorskip("transformers")
    from small_models import text_model
    from transformers import AttentionInterface

    seen = {}

    def keep(module, query, key, value, mask, **_):
        seen.update(q=query.transpose(1, 2), k=key.transpose(1, 2), v=value.transpose(1, 2))
        return query.transpose(1, 2), None

    AttentionInterface.register("keeps_its_arguments", keep)
    model = text_model().to(dtype)
    model.config._attn_implementation = "keeps_its_arguments"
    attention = model.model.layers[layer_index].self_attn
    for norm in (attention.q_norm, attention.k_norm):
        norm.weight.copy_(1 + 0.3 * torch.randn(norm.weight.shape))
    hidden = torch.randn(2, 7, model.config.hidden_size).to(dtype)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [5, 6, 7, 8, 9, 10, 11]])
    cos, sin = model.model.rotary_emb(hidden, positions, attention.layer_type)
    attention(hidden, (cos, sin), None, {})

    def heads(projection):
        return projection(hidden).view(2, 7, -1, attention.head_dim)

    raw_q, raw_k = heads(attention.q_proj), heads(attention.k_proj)
    lengths = torch.tensor([0, 5])
    values = torch.zeros(2, 12, *raw_k.shape[2:], dtype=dtype)
    if layer_index == 5:
        assert bool((sin[..., 64:256] == 0).all())  # three quarters of the pairs do not rotate
        out = k_eq_v_norm_rope_append(raw_q, raw_k, attention.q_norm.weight, cos, sin, values, cache_seqlens=lengths)
    else:
        keys = torch.zeros_like(values)
        out = qkv_norm_rope_append(
            raw_q, raw_k, heads(attention.v_proj), attention.q_norm.weight, attention.k_norm.weight, cos, sin, keys,
            values, cache_seqlens=lengths,
        )  # fmt: skip
        assert torch.equal(keys[0, :7], seen["k"][0])
        assert torch.equal(keys[1, 5:12], seen["k"][1])
    assert torch.equal(out, seen["q"])
    assert torch.equal(values[0, :7], seen["v"][0])
    assert torch.equal(values[1, 5:12], seen["v"][1])


@kinds
def test_the_angles_of_a_pair_need_not_be_equal(kind):
    """transformers repeats each angle; the formula does not ask for it."""
    layer = KINDS[kind](torch.float64)
    layer = replace(layer, cos=torch.randn(layer.cos.shape).double(), sin=torch.randn(layer.sin.shape).double())
    out = layer.append(layer.caches(8))
    low, high = rms_norm(layer.q, layer.q_weight).chunk(2, dim=-1)
    (cos_low, cos_high), (sin_low, sin_high) = (x[:, :, None].chunk(2, dim=-1) for x in (layer.cos, layer.sin))
    assert torch.equal(out, torch.cat((low * cos_low - high * sin_low, high * cos_high + low * sin_high), dim=-1))


@kinds
def test_fp64_stays_fp64(kind):
    layer = KINDS[kind](torch.float64)
    caches = layer.caches(8)
    out = layer.append(caches)
    assert torch.equal(out, apply_rope(rms_norm(layer.q, layer.q_weight), layer.cos, layer.sin))
    assert torch.equal(written(caches, layer)[-1], rms_norm(layer.v))


@kinds
def test_eps_is_inside_the_root(kind):
    layer = KINDS[kind](torch.float64)
    caches = layer.caches(8)
    out = layer.append(caches, eps=0.5)
    assert torch.equal(out, apply_rope(rms_norm(layer.q, layer.q_weight, 0.5), layer.cos, layer.sin))
    assert torch.equal(written(caches, layer)[-1], rms_norm(layer.v, eps=0.5))


def test_k_eq_v_attention_reads_what_was_written():
    """A full layer in two calls: the values written are those from which the keys are rebuilt."""
    layer = full_layer(torch.float64, batch=1, rows=6)
    position = torch.arange(6)
    inv_freq = draw.inv_freq(64)
    angle = torch.cat([position[:, None] * inv_freq.double()] * 2, dim=-1)[None]
    layer = replace(layer, cos=angle.cos(), sin=angle.sin(), lengths=torch.tensor([0]))
    caches = layer.caches(9)
    q = layer.append(caches)
    out = k_eq_v_attention(q, *caches, layer.k_weight, inv_freq, cache_seqlens=6)
    keys = apply_rope(rms_norm(layer.k, layer.k_weight), layer.cos, layer.sin)
    scores = torch.einsum("bqhd,bkd->bhqk", q, keys[:, :, 0])
    scores += torch.full((6, 6), float("-inf"), dtype=torch.float64).triu(1)
    expected = torch.einsum("bhqk,bkd->bqhd", scores.softmax(-1), rms_norm(layer.k)[:, :, 0])
    torch.testing.assert_close(out, expected)


# Where rows go ------------------------------------------------------------------------------------------------------


@kinds
def test_only_the_new_rows_of_a_cache_change(kind):
    layer = KINDS[kind](torch.bfloat16)
    caches = layer.caches(9, fill=7.0)
    layer.append(caches)
    for cache in caches:
        kept = torch.ones(cache.shape[:2], dtype=torch.bool)
        for request, length in enumerate(layer.lengths.tolist()):
            kept[request, length : length + layer.k.shape[1]] = False
        assert bool((cache[kept] == 7.0).all())
        assert not bool((cache[~kept] == 7.0).all(dim=-1).any())


@kinds
@pytest.mark.parametrize("integers", [torch.int32, torch.int64], ids=str)
def test_pages_hold_what_a_contiguous_cache_holds(kind, integers):
    layer = KINDS[kind](torch.bfloat16, rows=7)
    layer.lengths = torch.tensor([3, 0], dtype=integers)
    plain = layer.caches(12, fill=0.0)
    expected = layer.append(plain)
    table = torch.tensor([[5, 0, 2, 99], [1, 7, -1, 3]], dtype=integers)  # 4 rows a page; no row reaches 99 or -1
    pages = [cache.new_zeros((9, 4, *cache.shape[2:])) for cache in plain]
    assert torch.equal(layer.append(pages, table), expected)
    for cache, paged in zip(plain, pages, strict=True):
        assert torch.equal(cache[0], paged[[5, 0, 2]].flatten(0, 1))
        assert torch.equal(cache[1, :8], paged[[1, 7]].flatten(0, 1))
        assert not paged[[3, 4, 6, 8]].any()


@kinds
def test_row_bits_do_not_depend_on_the_batch_or_on_strides(kind):
    assert_rows_keep_their_bits_alone(KINDS[kind](torch.bfloat16, rows=5))


@kinds
def test_one_rotation_for_all_requests(kind):
    layer = KINDS[kind](torch.bfloat16)
    shared = replace(layer, cos=layer.cos[:1], sin=layer.sin[:1])
    alike = replace(layer, cos=layer.cos[:1].expand(2, -1, -1), sin=layer.sin[:1].expand(2, -1, -1))
    one, two = shared.caches(8, fill=0.0), shared.caches(8, fill=0.0)
    assert torch.equal(shared.append(one), alike.append(two))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


# Wrong calls --------------------------------------------------------------------------------------------------------

PAGES = torch.zeros(4, 4, 2, 64)
FAR = {"device": "meta"}

# changes to a right call of qkv_norm_rope_append (B 2, S 3, 4 heads of 64 over 2, capacity 8), the error, what it says
WRONG = [
    ({"q": None}, TypeError, "q must be a tensor, got NoneType"),
    ({"q": torch.zeros(2, 3, 256)}, ShapeError, r"q must have shape \(B, S, Hq, D\), got \(2, 3, 256\)"),
    ({"q": torch.zeros(2, 3, 3, 64)}, ShapeError, "q's heads must be a multiple of k's 2 heads, got 3"),
    ({"q": torch.zeros(2, 3, 4, 63)}, ShapeError, "head_dim must be even, got 63"),
    ({"q": torch.zeros(2, 3, 4, 514)}, ShapeError, r"head_dim must lie in \[1, 512\], got 514"),
    ({"q": torch.zeros(2, 3, 4, 64, dtype=torch.int32)}, DTypeError, "q must be bfloat16 or"),
    ({"k": torch.zeros(2, 4, 2, 64)}, ShapeError, r"k must have shape \(2, 3, Hkv, 64\), got \(2, 4, 2, 64\)"),
    ({"v": torch.zeros(2, 3, 1, 64)}, ShapeError, r"v must have shape \(2, 3, 2, 64\), got \(2, 3, 1, 64\)"),
    ({"v": torch.zeros(2, 3, 2, 64).half()}, DTypeError, "v must be float32, got float16"),
    ({"k": torch.zeros(2, 3, 64, 2).transpose(2, 3)}, StrideError, "k must be dense in its last dim"),
    ({"q_norm_weight": torch.ones(32)}, ShapeError, r"q_norm_weight must have shape \(64\), got \(32\)"),
    ({"k_norm_weight": torch.ones(64, dtype=torch.int64)}, DTypeError, "k_norm_weight must be bfloat16 or"),
    ({"cos": torch.ones(2, 3, 32)}, ShapeError, r"cos must have shape \(B or 1, 3, 64\), got \(2, 3, 32\)"),
    ({"cos": torch.ones(3, 3, 64)}, ShapeError, r"cos must have shape \(2, 3, 64\), got \(3, 3, 64\)"),
    ({"sin": torch.ones(1, 3, 64)}, ShapeError, r"sin must have shape \(2, 3, 64\), got \(1, 3, 64\)"),
    ({"sin": torch.ones(2, 3, 64).half()}, DTypeError, "sin must be float32, got float16"),
    ({"k_cache": torch.zeros(3, 8, 2, 64)}, ShapeError, r"k_cache must have shape \(2, capacity, 2, 64\), got"),
    ({"k_cache": torch.zeros(2, 8, 1, 64)}, ShapeError, r"k_cache must have shape \(2, capacity, 2, 64\), got"),
    ({"v_cache": torch.zeros(2, 9, 2, 64)}, ShapeError, r"v_cache must have shape \(2, 8, 2, 64\), got"),
    ({"v_cache": torch.zeros(2, 8, 2, 64).half()}, DTypeError, "v_cache must be float32, got float16"),
    ({"v_cache": torch.zeros(1, 8, 2, 64).expand(2, -1, -1, -1)}, StrideError, "v_cache must not be expanded"),
    ({"v_cache": torch.zeros(2, 8, 2, 64, **FAR)}, DeviceError, "v_cache must be on cpu like q, got meta"),
    ({"cache_seqlens": None}, ValueError, "cache_seqlens must say where"),
    ({"cache_seqlens": 6}, ValueError, "cache_seqlens must be at most 5, got 6"),
    ({"cache_seqlens": -1}, ValueError, "cache_seqlens must be at least 0, got -1"),
    ({"cache_seqlens": torch.tensor([1])}, ShapeError, r"cache_seqlens must have shape \(2\), got \(1\)"),
    ({"cache_seqlens": torch.tensor([1.0, 2])}, DTypeError, "cache_seqlens must be int32 or int64"),
    ({"cache_seqlens": torch.tensor([6, 1])}, ValueError, r"before 3 new rows must lie in \[0, 5\], got 6"),
    ({"cache_seqlens": torch.tensor([-1, 1])}, ValueError, r"before 3 new rows must lie in \[0, 5\], got -1"),
    ({"eps": 0.0}, ValueError, "eps must be positive and finite, got 0.0"),
    ({"block_table": torch.zeros(2, 2)}, DTypeError, "block_table must be int32 or int64, got float32"),
    ({"block_table": torch.zeros(1, 2, dtype=torch.int32)}, ShapeError, "block_table must have shape"),
    *(
        ({"k_cache": PAGES.clone(), "v_cache": PAGES.clone(), "block_table": torch.tensor(table)}, ValueError, says)
        for table, says in [
            ([[0, 4], [2, 3]], r"block_table where rows are written must lie in \[0, 3\], got 4"),
            ([[0, -1], [2, 3]], r"block_table where rows are written must lie in \[0, 3\], got -1"),
            ([[0, 1], [0, 3]], "block_table must give each new row a place of its own"),
        ]
    ),
]


def right_call(**changes):
    layer = sliding_layer(torch.float32)
    k_cache, v_cache = layer.caches(8, fill=0.0)
    call = {
        "q": layer.q, "k": layer.k, "v": layer.v, "q_norm_weight": layer.q_weight, "k_norm_weight": layer.k_weight,
        "cos": layer.cos, "sin": layer.sin, "k_cache": k_cache, "v_cache": v_cache,
        "cache_seqlens": torch.tensor([3, 2]),
    }  # fmt: skip
    return call | changes


def v_only(call):
    """The same call of the function with a cache of values alone; None where the change does not concern it."""
    call = dict(call)
    del call["v"], call["k_norm_weight"], call["k_cache"]
    call["values"] = call.pop("v_cache")
    return call


@pytest.mark.parametrize(("changes", "error", "says"), WRONG, ids=[says for *_, says in WRONG])
def test_a_wrong_call_is_refused_by_name_and_writes_nothing(changes, error, says):
    call = right_call(**changes)
    with pytest.raises(error, match=says) as caught:
        qkv_norm_rope_append(**call)
    assert str(caught.value).startswith("qkv_norm_rope_append: ")
    for cache in (call["k_cache"], call["v_cache"]):
        assert cache.device.type == "meta" or not cache.any()


WRONG_V_ONLY = [
    # Values may also have 8 bits.
    (
        changes,
        error,
        says.replace("v_cache must be float32,", "values must be float32 or .*,").replace("v_cache", "values"),
    )
    for changes, error, says in WRONG
    # What concerns an argument that only the other function has, or its two caches being alike.
    if not {"v", "k_norm_weight"} & set(changes) and set(changes) != {"k_cache"} and r"\(2, 8," not in says
]


@pytest.mark.parametrize(("changes", "error", "says"), WRONG_V_ONLY, ids=[says for *_, says in WRONG_V_ONLY])
def test_a_wrong_call_with_values_alone_is_refused_too(changes, error, says):
    call = v_only(right_call(**changes))
    with pytest.raises(error, match=says) as caught:
        k_eq_v_norm_rope_append(**call)
    assert str(caught.value).startswith("k_eq_v_norm_rope_append: ")
    assert call["values"].device.type == "meta" or not call["values"].any()


def test_the_right_calls_are_right():
    assert qkv_norm_rope_append(**right_call()).shape == (2, 3, 4, 64)
    assert k_eq_v_norm_rope_append(**v_only(right_call())).shape == (2, 3, 4, 64)


def test_a_backend_that_cannot_writes_nothing():
    call = right_call()
    with use_backend("cuda"), pytest.raises(BackendError, match="runs on cuda, not on cpu"):
        qkv_norm_rope_append(**call)
    assert not call["k_cache"].any()


@kinds
def test_no_rows_and_no_requests_are_calls_too(kind):
    for empty in (KINDS[kind](torch.float32, rows=0), KINDS[kind](torch.float32, batch=0)):
        caches = empty.caches(8, fill=0.0)
        assert empty.append(caches).shape == empty.q.shape
        assert not any(cache.any() for cache in caches)


# As PyTorch sees the ops --------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("paged", [False, True])
def test_opcheck(kind, paged):
    layer = KINDS[kind](torch.bfloat16)
    layer.lengths = torch.tensor([3, 2])
    table = torch.tensor([[3, 1], [0, 2]]) if paged else None
    caches = [cache.view(4, 4, *cache.shape[2:]) if paged else cache for cache in layer.caches(8, fill=0.0)]
    if layer.k_eq_v:
        op, raw = torch.ops.gemma4_kernels.k_eq_v_norm_rope_append, (layer.q, layer.k, layer.q_weight)
    else:
        op = torch.ops.gemma4_kernels.qkv_norm_rope_append
        raw = (layer.q, layer.k, layer.v, layer.q_weight, layer.k_weight)
    torch.library.opcheck(op.default, (*raw, layer.cos, layer.sin, *caches, layer.lengths, table, 1e-6))


@kinds
def test_compile_without_a_graph_break(kind):
    """The same bits as outside of a graph, shapes that change included."""

    def double(layer, caches):
        return layer.append(caches) * 2

    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    for rows in (1, 3, 5):
        layer = KINDS[kind](torch.bfloat16, rows=rows)
        plain, inside = layer.caches(12, fill=0.0), layer.caches(12, fill=0.0)
        assert torch.equal(compiled(layer, inside), double(layer, plain))
        assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


def test_it_works_outside_no_grad_and_with_parameters():
    call = right_call()
    expected = qkv_norm_rope_append(**call)
    call["q_norm_weight"] = torch.nn.Parameter(call["q_norm_weight"])
    call["q"] = call["q"].clone().requires_grad_()
    out = qkv_norm_rope_append(**call)
    assert torch.equal(out, expected)
    assert not out.requires_grad


def test_autocast_changes_nothing():
    expected = qkv_norm_rope_append(**right_call())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(qkv_norm_rope_append(**right_call()), expected)


def test_explain_writes_nothing():
    call = right_call()
    assert explain("qkv_norm_rope_append", **call).taken == "eager"
    assert not call["k_cache"].any()
    assert explain("k_eq_v_norm_rope_append", **v_only(call)).taken == "eager"
    assert explain("qkv_norm_rope_append", device_type="mps", features={"paged"}).taken == "eager"


@kinds
@pytest.mark.parametrize("paged", [False, True])
def test_on_a_device_it_uses_ops_that_mps_has_and_reads_nothing_back(kind, paged):
    pytest.importorskip("yaml")
    from device_ops import SYNCS, Recorder, has_mps_kernel, native_functions

    from gemma4_kernels.attention import eager_prologue

    layer = KINDS[kind](torch.bfloat16)
    caches = [cache.view(4, 4, *cache.shape[2:]) if paged else cache for cache in layer.caches(8)]
    raw = (layer.q, layer.k, layer.q_weight) if layer.k_eq_v else (
        layer.q, layer.k, layer.v, layer.q_weight, layer.k_weight
    )  # fmt: skip
    tensors = [x.to("meta") for x in (*raw, layer.cos, layer.sin, *caches, layer.lengths)]
    table = torch.tensor([[3, 1], [0, 2]], device="meta") if paged else None
    recorder = Recorder()
    with recorder:
        getattr(eager_prologue, "k_eq_v_norm_rope_append" if layer.k_eq_v else "qkv_norm_rope_append")(
            *tensors, table, 1e-6
        )
    entries = native_functions()
    assert len(recorder.seen) > 10
    assert not [name for name in recorder.seen if not has_mps_kernel(name, entries)]
    assert not [name for name in recorder.seen if name.split("::")[1].split(".")[0] in SYNCS]
    assert torch.float64 not in recorder.dtypes
