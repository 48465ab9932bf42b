"""A row's bits, in Triton's interpreter: sizes that reach every way in which chunks of keys meet rows."""

from __future__ import annotations

import pytest
import row_bits
import torch
from row_bits import Setting

from gemma4_kernels import environment, use_backend

pytest.importorskip("triton")
if not environment.triton_interprets():
    pytest.skip("needs TRITON_INTERPRET=1; `make test` runs it in a second process", allow_module_level=True)

from gemma4_kernels.attention.triton import tables
from gemma4_kernels.triton_common import devices

DTYPE = torch.bfloat16


@pytest.fixture(autouse=True)
def triton_backend():
    with use_backend("triton"):
        yield


# With eight KV heads a row's keys are cut into four chunks at most: beyond four of the smallest, chunks grow, so among 16 rows
# that end behind that length two sizes meet. No fp32 here: NumPy's own products of fp32 depend on a row's place in a tile.
SHORT = Setting("cpu", DTYPE, hq=4, hkv=2, d=32, keys=300, window=-1)
WINDOW = Setting("cpu", DTYPE, hq=4, hkv=2, d=32, keys=700, window=300)
TWO_SIZES = Setting("cpu", DTYPE, hq=8, hkv=8, d=16, keys=1032, window=-1)
K_EQ_V_TWO_SIZES = TWO_SIZES._replace(keys=520)


@pytest.mark.parametrize(("kernel", "setting"), [("decode", TWO_SIZES), ("k_eq_v decode", K_EQ_V_TWO_SIZES)])
def test_two_sizes_of_chunks_do_meet(kernel, setting):
    splits = tables.splits(devices.INTERPRETED_CARD.multiprocessors, setting.hkv)
    smallest = tables.MIN_TILES_OF_A_CHUNK * tables.lookup(kernel, "interpreter", setting.d, DTYPE).keys
    assert setting.keys - row_bits.ROWS < splits * smallest < setting.keys
    assert WINDOW.window > smallest


@pytest.mark.parametrize("setting", [SHORT, TWO_SIZES, WINDOW], ids=str)
def test_rows_alone(setting):
    row_bits.assert_rows_alone(setting)


@pytest.mark.parametrize("setting", [SHORT._replace(hq=16, hkv=1), K_EQ_V_TWO_SIZES], ids=str)
def test_k_eq_v_rows_alone(setting):
    row_bits.assert_k_eq_v_rows_alone(setting)


@pytest.mark.parametrize("setting", [SHORT, WINDOW], ids=str)
def test_any_batch(setting):
    row_bits.assert_any_batch(setting)


@pytest.mark.parametrize("page_size", [16, 32, 64, 5])
def test_pages(page_size):
    row_bits.assert_pages(SHORT, page_size)


@pytest.mark.parametrize("setting", [SHORT, WINDOW], ids=str)
def test_padding_in_front(setting):
    row_bits.assert_padding_in_front(setting)
