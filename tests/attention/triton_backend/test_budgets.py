"""Every configuration of the tables, compiled for cards that are not here, and held to what those cards have."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from gemma4_kernels import environment

pytest.importorskip("triton")
if environment.triton_interprets():
    pytest.skip("compiles kernels, which TRITON_INTERPRET=1 prevents", allow_module_level=True)

# Another compiler allots registers otherwise: budgets are held for the release that the repository is tested with.
import triton

from gemma4_kernels.attention.triton import tables
from gemma4_kernels.bench import attention_kernels, cards, sass, static
from gemma4_kernels.triton_common.launch import Launch

if not triton.__version__.startswith("3.7"):
    pytest.skip(f"budgets are those of Triton 3.7, this is {triton.__version__}", allow_module_level=True)
if sass.cuobjdump() is None:
    pytest.skip("cuobjdump is not installed", allow_module_level=True)

# What may wait in local memory, for the reason that stands in the table: bytes of stack, and the share of a loop's instructions
# that go there.
PARKED_BYTES = {"k_eq_v decode d512": 96, "k_eq_v prefill d512": 96, "decode d256": 8}
PARKED_SHARE = 0.01


class Compiled(NamedTuple):
    reading: static.Reading
    launch: Launch
    shape: attention_kernels.Shape

    @property
    def splits_keys(self) -> bool:
        """It is the loop of a decode kernel that Gemma reaches."""
        return "decode" in self.launch.name and not self.launch.constants.get("TURN_ALL", False)


def compiled(architecture: str, dtype: torch.dtype = torch.bfloat16, extras: bool = False) -> dict[str, Compiled]:
    """By name. `extras`: calls with pages or blocks too, which have the same rows of the tables."""
    found = {}
    for name, launch, shape in attention_kernels.launches(architecture, dtype):
        if extras or not (shape.paged or shape.blocks):
            (reading,) = static.read(attention_kernels.compile_launch(name, launch, shape, architecture))
            found[name] = Compiled(reading, launch, shape)
    return found


@pytest.fixture(scope="module", params=static.ARCHITECTURES)
def kernels(request):
    """Of one architecture."""
    return compiled(request.param, extras=request.param == "sm_86")


def assert_nothing_is_spilled(name: str, reading: static.Reading) -> None:
    allowed = {} if "any pairs" in name or (name.startswith("decode") and "float32" not in name) else PARKED_BYTES
    parked = next((size for kernel, size in allowed.items() if name.startswith(kernel)), 0)
    assert reading.stack_bytes <= parked, f"{name}: {reading.stack_bytes} bytes of stack"
    for loop in reading.loops:
        assert loop.local_accesses <= (PARKED_SHARE * loop.instructions if parked else 0), f"{name}: {loop}"


def test_shared_memory_fits_the_class_of_the_architecture(kernels):
    for name, (reading, _, _) in kernels.items():
        limit = tables.SHARED_BYTES[tables.kind_of(reading.kernel.architecture)]
        assert reading.shared_bytes <= limit, f"{name}: {reading.shared_bytes} bytes"


def test_nothing_is_spilled(kernels):
    """But where the table gives a reason."""
    for name, (reading, _, _) in kernels.items():
        assert_nothing_is_spilled(name, reading)
        assert 16 <= reading.registers <= 255


def test_the_main_loop_of_decode_loads_16_bytes_at_a_time(kernels):
    """All of keys and values, and nothing twice; page numbers and block ids are 4 bytes each."""
    decode = {name: kernel for name, kernel in kernels.items() if kernel.splits_keys}
    assert len(decode) >= 5
    for name, kernel in decode.items():
        widths = kernel.reading.main_loop.copies
        caches = 1 if kernel.shape.kernel.startswith("k_eq_v") else 2
        tile = kernel.launch.constants["BLOCK_N"] * caches * kernel.shape.head_dim * 2
        assert widths[16] * 16 * sass.LANES * kernel.launch.num_warps == tile, f"{name}: {widths}"
        assert set(widths) <= {4, 16}
        assert widths.get(4, 0) <= 2, f"{name}: {widths}"


def test_k_eq_v_decode_keeps_two_tiles_of_keys_in_shared_memory():
    """On the smallest cards: 32 keys of 512 columns, one being read while the next arrives, beside the queries."""
    tile, queries = 32 * 512 * 2, 16 * 384 * 2
    kernels = compiled("sm_86", extras=True)
    k_eq_v = {
        name: kernel for name, kernel in kernels.items() if name.startswith("k_eq_v decode") and kernel.splits_keys
    }
    assert len(k_eq_v) == 4  # one row and five, contiguous and paged
    for name, kernel in k_eq_v.items():
        assert kernel.reading.shared_bytes >= 2 * tile + queries, name


@pytest.mark.parametrize(("architecture", "card"), [("sm_86", "rtx 3060"), ("sm_89", "rtx 4060")])
def test_decode_of_one_row_is_bound_by_memory_on_paper(architecture, card):
    """Instructions and tensor cores need less time for 128 bytes of cache than the memory does to bring them."""
    single = {name: k for name, k in compiled(architecture).items() if k.splits_keys and k.shape.rows == 1}
    assert len(single) == 4  # head dims 128, 256 and 512, and k_eq_v
    for name, kernel in single.items():
        cost = static.predict(kernel.reading, cards.find(card))
        assert cost.binding[0] == "memory", f"{name}: {cost}"
        assert cost.instructions < cost.budget / 2, f"{name}: {cost}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_other_dtypes_fit_the_smallest_cards(dtype):
    for name, (reading, _, _) in compiled("sm_86", dtype).items():
        assert reading.shared_bytes <= tables.SHARED_BYTES["consumer"], name
        assert_nothing_is_spilled(name, reading)
