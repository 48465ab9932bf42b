"""On a GPU only: Triton's kernels at the sizes of the 12B."""

from __future__ import annotations

import pytest
import row_bits
import torch
from row_bits import Setting

from gemma4_kernels import flash_attn_with_kvcache, k_eq_v_attention, use_backend
from gemma4_kernels.bench import validation
from gemma4_kernels.bench.cases import attention_cases, select

pytest.importorskip("triton")
from gemma4_kernels.attention.triton import tables
from gemma4_kernels.triton_common import devices

pytestmark = pytest.mark.gpu

SLIDING = Setting("cuda", torch.bfloat16, hq=16, hkv=8, d=256, keys=4000, window=1023)
FULL = Setting("cuda", torch.bfloat16, hq=16, hkv=1, d=512, keys=4000, window=-1)


@pytest.fixture(autouse=True)
def triton_backend():
    with use_backend("triton"):
        yield


@pytest.mark.parametrize("case", select(attention_cases(), "quick"), ids=str)
def test_a_case_is_held(case):
    (found,) = validation.check_case(case, ["triton"], torch.device("cuda"))
    assert (found.status, found.reasons) == ("held", ())


@pytest.mark.parametrize("keys", [17, 1030, 4000, 33000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rows_alone(keys, dtype):
    row_bits.assert_rows_alone(SLIDING._replace(keys=keys, dtype=dtype))
    row_bits.assert_rows_alone(FULL._replace(keys=keys, dtype=dtype))
    row_bits.assert_k_eq_v_rows_alone(FULL._replace(keys=keys, dtype=dtype))


def where_two_sizes_meet(kernel: str, setting: Setting) -> int:
    """A length at which chunks of two sizes meet among 16 rows on this card: 8 keys behind the last of the smallest size."""
    card = devices.card_of(torch.device("cuda", 0))
    config = tables.lookup(kernel, card.architecture, setting.d, setting.dtype)
    smallest = tables.MIN_TILES_OF_A_CHUNK * config.keys
    return tables.splits(card.multiprocessors, setting.hkv) * smallest + 8


def test_rows_alone_where_chunks_of_two_sizes_meet():
    full = FULL._replace(keys=where_two_sizes_meet("decode", FULL))
    sliding = SLIDING._replace(keys=where_two_sizes_meet("decode", SLIDING), window=-1)
    row_bits.assert_rows_alone(full)
    row_bits.assert_rows_alone(sliding)
    row_bits.assert_k_eq_v_rows_alone(FULL._replace(keys=where_two_sizes_meet("k_eq_v decode", FULL)))


@pytest.mark.parametrize("setting", [SLIDING, FULL], ids=str)
def test_any_batch_pages_and_padding(setting):
    row_bits.assert_any_batch(setting)
    row_bits.assert_padding_in_front(setting)
    for page_size in (16, 32, 64):
        row_bits.assert_pages(setting, page_size)


def test_a_captured_graph_follows_lengths_that_change():
    """Nothing in a call waits for the device, or allocates by what it holds."""
    q, k, v = FULL.drawn(batch=2)
    q = q[:, :5].contiguous()
    lengths = torch.tensor([100, 3000], dtype=torch.int32, device="cuda")

    def step():
        return (
            flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, causal=True),
            k_eq_v_attention(q, v, *weights, cache_seqlens=lengths),
        )

    weights = FULL.weights()
    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for new in ([7, 4000], [2049, 64]):
        lengths.copy_(torch.tensor(new, dtype=torch.int32))
        graph.replay()
        for got, expected in zip(captured, step(), strict=True):
            assert torch.equal(got, expected)
