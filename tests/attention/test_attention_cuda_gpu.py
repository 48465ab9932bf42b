"""The compiled attention over a cache on the GPU that is there: values and row bits at sizes of the 12B; streams and graphs."""

from __future__ import annotations

import pytest
import row_bits
import torch
from on_gpu import _cuda_backend, captured, needs_gpu, on_another_stream, same_bits  # noqa: F401
from row_bits import Setting

from gemma4_kernels import RingCache, flash_attn_with_kvcache, k_eq_v_attention
from gemma4_kernels.bench import validation
from gemma4_kernels.bench.cases import parse

pytestmark = needs_gpu

DEVICE = "cuda"
SLIDING = Setting(DEVICE, torch.bfloat16, hq=16, hkv=8, d=256, keys=4000, window=1023)
FULL = Setting(DEVICE, torch.bfloat16, hq=16, hkv=1, d=512, keys=4000, window=-1)
PACKED = "1:1+7:7+3:130+5:4000+0:9+16:1700"
ROWS = ("", "sq=5,", "sq=16,")
CASES = (
    *(f"flash_attn_func({rows}sk=32768,{window}right=0)" for rows in ROWS for window in ("left=1023,", "")),
    "flash_attn_func(b=16,sq=5,sk=4096,dtype=fp16,left=1023,right=0)",
    "flash_attn_func(sq=5,sk=1030,right=0,softcap=5.0)",
    *(f"flash_attn_varlen_func(left=1023,right=0,lengths={PACKED}{pages})" for pages in ("", ",page=16")),
    "flash_attn_with_kvcache(sq=5,left=1023,right=0,lengths=5+700+4130+40,page=64)",
    *(f"k_eq_v_attention({rows}sk=32768,hkv=1,d=512)" for rows in ROWS),
    "k_eq_v_attention(b=16,sq=5,sk=4096,hkv=1,d=512,dtype=fp16)",
    "k_eq_v_attention(sq=5,hkv=1,d=512,lengths=5+700+4130+40,page=16)",
    *(f"k_eq_v_attention({rows}sk=32768,hkv=1,d=512,cache={codes})" for rows in ROWS for codes in ("fp8", "int8")),
    "k_eq_v_attention(sq=5,hkv=1,d=512,lengths=5+700+4130+40,page=16,cache=fp8)",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_case_is_held(case):
    (found,) = validation.check_case(parse(case), ["cuda"], torch.device(DEVICE))
    assert (found.status, found.reasons) == ("held", ())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("keys", [17, 1030, 4000, 32768])
def test_rows_alone(keys, dtype):
    for window in (1023, -1):
        row_bits.assert_rows_alone(SLIDING._replace(keys=keys, dtype=dtype, window=window))
    row_bits.assert_k_eq_v_rows_alone(FULL._replace(keys=keys, dtype=dtype))


def test_any_batch_and_pages():
    row_bits.assert_any_batch(SLIDING)
    for page_size in (16, 64):
        row_bits.assert_pages(SLIDING, page_size)


def test_padding_in_front():
    q, k, v = SLIDING.drawn()
    expected = flash_attn_with_kvcache(q, k, v, **SLIDING.options)
    padded = (torch.cat((torch.full_like(x[:, :37], float("nan")), x), dim=1) for x in (k, v))
    leftpad = torch.tensor([37], dtype=torch.int32, device=DEVICE)
    got = flash_attn_with_kvcache(q, *padded, cache_leftpad=leftpad, **SLIDING.options)
    assert torch.equal(got, expected)


def test_a_ring_gives_the_bits_of_a_cache_that_holds_everything():
    ring = RingCache.allocate(1, 1024, SLIDING.hkv, SLIDING.d, dtype=SLIDING.dtype, device=DEVICE)
    q, k, v = SLIDING.drawn()
    table, lengths = ring.block_table(SLIDING.keys), torch.tensor([SLIDING.keys], dtype=torch.int32, device=DEVICE)
    kept = torch.arange(SLIDING.keys - ring.capacity, SLIDING.keys, device=DEVICE)
    for of_ring, whole in ((ring.k, k), (ring.v, v)):
        of_ring[:, kept % ring.capacity] = whole[:, kept]
    options = {"cache_seqlens": lengths, "causal": True, "return_lse": True, **SLIDING.options}
    expected = flash_attn_with_kvcache(q, k, v, **options)
    got = flash_attn_with_kvcache(q, *ring.pages(), block_table=table, **options)
    assert same_bits(got, expected)


def calls():
    """A step of a sliding and of a full layer over lengths that may change: (run, lengths)."""
    q, k, v = SLIDING.drawn(batch=2)
    full_q, _, values = FULL.drawn(batch=2)
    q, full_q = q[:, :5].contiguous(), full_q[:, :5].contiguous()
    weights, lengths = FULL.weights(), torch.tensor([100, 3000], dtype=torch.int32, device=DEVICE)

    def run():
        return (
            flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, **SLIDING.options),
            k_eq_v_attention(full_q, values, *weights, cache_seqlens=lengths),
        )

    return run, lengths


def test_another_stream():
    run, _ = calls()
    expected = run()
    assert same_bits(on_another_stream(run), expected)


def test_a_captured_graph_follows_lengths_that_change():
    """Nothing in a call waits for the device, or allocates by what it holds."""
    run, lengths = calls()
    results, graph = captured(run)
    for new in ([7, 4000], [2049, 64]):
        lengths.copy_(torch.tensor(new, dtype=torch.int32))
        graph.replay()
        assert same_bits(results, run())
