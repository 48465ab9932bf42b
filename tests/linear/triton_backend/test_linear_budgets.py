"""The quantised products, compiled for cards that are not here, and held to what those cards have."""

from __future__ import annotations

from itertools import chain

import pytest
from budgets import assert_fits

from gemma4_kernels import environment

pytest.importorskip("triton")
if environment.triton_interprets():
    pytest.skip("compiles kernels, which TRITON_INTERPRET=1 prevents", allow_module_level=True)

from gemma4_kernels.bench import cards, linear_kernels, sass, static
from gemma4_kernels.linear.schemes import SCHEMES

if sass.cuobjdump() is None:
    pytest.skip("cuobjdump is not installed", allow_module_level=True)

# What most downloaded files of the 12B hold; the others are compiled for sm_86 only.
COMMON = ("Q4_0", "W4A16", "Q4_K", "Q6_K")


def compiled(architecture: str) -> dict[str, static.Reading]:
    """Each binary once, under the name of its first call."""
    found, seen = {}, set()
    for name, launch, weight, rows in chain(linear_kernels.launches(), linear_kernels.fused_launches()):
        binary = (
            launch.name,
            weight.scheme,
            tuple(sorted((key, str(value)) for key, value in launch.constants.items())),
        )
        if binary not in seen and (architecture == "sm_86" or weight.scheme in COMMON):
            seen.add(binary)
            (found[name],) = static.read(linear_kernels.compile_launch(name, launch, weight, rows, architecture))
    return found


@pytest.fixture(scope="module", params=static.ARCHITECTURES)
def readings(request):
    return compiled(request.param)


def test_everything_fits(readings):
    for name, reading in readings.items():
        assert_fits(name, reading)


def weight_values(name: str) -> str:
    return SCHEMES[name.split()[1]].values


def test_codes_are_loaded_16_bytes_at_a_time(readings):
    for name, reading in readings.items():
        if " 1 rows" in name and reading.kernel.loop_bytes:
            words = 64 * 16 * 4 * (2 if name.startswith("geglu") else 1)  # bytes of codes of a tile
            loop, wide = reading.main_loop, reading.main_loop.copies.get(16, 0)
            # With two weights and a table the compiler copies ahead what it looks up there, and loads codes as they are needed.
            if name.startswith("geglu") and weight_values(name) == "table":
                wide += loop.loads.get(16, 0)
            assert wide * 16 * sass.LANES * reading.kernel.warps >= words, name


@pytest.mark.parametrize(("readings", "card"), [("sm_86", "rtx 3060"), ("sm_89", "rtx 4060")], indirect=["readings"])
def test_up_to_16_rows_are_bound_by_memory_on_paper(readings, card):
    """One binary serves 1 to 16 rows, so what it issues and multiplies is the same for all of them."""
    wanted = [f"{kernel} {scheme} " for kernel in ("linear", "geglu") for scheme in COMMON]
    wanted += ["argmax Q6_K ", "argmax Q4_0 "]
    for call in wanted:
        name = next(name for name in readings if name.startswith(call) and " 1 rows" in name)
        cost = static.predict(readings[name], cards.find(card))
        assert cost.binding[0] == "memory", f"{name}: {cost}"
