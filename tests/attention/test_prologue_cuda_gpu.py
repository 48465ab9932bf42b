"""The compiled prologue on the GPU that is there: the eager backend's bits at sizes of the 12B, any cache; streams, graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from on_gpu import _cuda_backend, captured, needs_gpu, on_another_stream, same_bits  # noqa: F401
from prologue_helpers import DTYPES, GEMMA, KINDS, Layer, sliding_layer, with_exact_sums

from gemma4_kernels import RingCache, use_backend
from gemma4_kernels.bench import inputs as draw

pytestmark = needs_gpu

DEVICE = "cuda"
kinds = pytest.mark.parametrize("kind", KINDS)


def on_device(layer: Layer) -> Layer:
    k = layer.k.to(DEVICE)
    moved = {name: value.to(DEVICE) for name, value in vars(layer).items() if name not in ("k", "v")}
    return replace(layer, k=k, v=k if layer.k_eq_v else layer.v.to(DEVICE), **moved)


def assert_like_eager(layer: Layer, caches: list[torch.Tensor], table: torch.Tensor | None = None) -> None:
    """On the CPU: the same bits in q and in the whole of the caches."""
    k = layer.k.cpu()
    moved = {name: value.cpu() for name, value in vars(layer).items() if name not in ("k", "v")}
    expected = [cache.cpu().clone() for cache in caches]
    with use_backend("eager"):
        here = replace(layer, k=k, v=k if layer.k_eq_v else layer.v.cpu(), **moved)
        want = here.append(expected, None if table is None else table.cpu())
    got = layer.append(caches, table)
    for one, other in zip([got, *caches], [want, *expected], strict=True):
        assert torch.equal(one.cpu(), other)


@kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 16, 300])
def test_bits_where_sums_are_exact(rows, dtype, kind):
    """The order of the sum of squares is all that may differ from the eager backend, and here it makes no difference."""
    layer = on_device(with_exact_sums(KINDS[kind](dtype, batch=3, rows=rows, **GEMMA[kind])))
    assert_like_eager(layer, layer.caches(rows + 9, fill=3.0))


@kinds
def test_pages_in_any_order(kind):
    layer = on_device(with_exact_sums(KINDS[kind](torch.bfloat16, rows=5, **GEMMA[kind])))
    contiguous = [cache.cpu() for cache in layer.caches(48, fill=3.0)]
    pages, tables = zip(*(draw.scattered_pages(cache, 16, draw.generator(5)) for cache in contiguous), strict=True)
    assert_like_eager(layer, [each.nan_to_num(3.0).to(DEVICE) for each in pages], tables[0].to(DEVICE))


def test_a_ring_that_has_turned():
    layer = with_exact_sums(sliding_layer(torch.bfloat16, rows=16, **GEMMA["sliding"]))
    layer = on_device(replace(layer, lengths=torch.tensor([1030, 4093], dtype=torch.int32)))
    ring = RingCache.allocate(2, 1024, 8, 256, dtype=torch.bfloat16, device=DEVICE)
    assert_like_eager(layer, list(ring.pages()), ring.block_table(5000))


@kinds
def test_nearly_all_bits_and_rows_alone(kind):
    layer = on_device(KINDS[kind](torch.bfloat16, rows=16, **GEMMA[kind]))
    caches, of_eager = layer.caches(24, fill=0.0), layer.caches(24, fill=0.0)
    together = layer.append(caches)
    with use_backend("eager"):
        expected = layer.append(of_eager)
    for got, want in zip([together, *caches], [expected, *of_eager], strict=True):
        assert float((got == want).double().mean()) >= 0.999
    for row in (0, 7, 15):
        one = {name: getattr(layer, name)[:, row : row + 1] for name in ("q", "cos", "sin")}
        k = layer.k[:, row : row + 1]
        v = k if layer.k_eq_v else layer.v[:, row : row + 1]
        alone = replace(layer, k=k, v=v, lengths=layer.lengths + row, **one)
        again = [cache.clone() for cache in caches]
        assert torch.equal(alone.append(again), together[:, row : row + 1])
        assert same_bits(again, caches)


@kinds
def test_another_stream(kind):
    layer = on_device(KINDS[kind](torch.bfloat16, rows=5, **GEMMA[kind]))
    expected, got = layer.caches(16, fill=0.0), layer.caches(16, fill=0.0)
    out = layer.append(expected)
    other = on_another_stream(lambda: layer.append(got))
    assert same_bits([other, *got], [out, *expected])


@kinds
def test_a_captured_graph_follows_lengths_that_change(kind):
    layer = on_device(KINDS[kind](torch.bfloat16, rows=5, **GEMMA[kind]))
    caches = layer.caches(64, fill=0.0)
    result, graph = captured(lambda: layer.append(caches))
    for length in (30, 59):
        layer.lengths.fill_(length)
        expected = [cache.clone() for cache in caches]
        out = layer.append(expected)
        result.zero_()
        graph.replay()
        assert same_bits([result, *caches], [out, *expected])
