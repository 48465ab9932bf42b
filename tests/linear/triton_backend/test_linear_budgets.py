"""The quantised products, compiled for cards that are not here, and held to what those cards have."""

from __future__ import annotations

import pytest

from gemma4_kernels import environment

pytest.importorskip("triton")
if environment.triton_interprets():
    pytest.skip("compiles kernels, which TRITON_INTERPRET=1 prevents", allow_module_level=True)

from gemma4_kernels.bench import cards, linear_kernels, sass, static

if sass.cuobjdump() is None:
    pytest.skip("cuobjdump is not installed", allow_module_level=True)

CONSUMER_BYTES = 101376
# What most downloaded files of the 12B hold; the others are compiled for sm_86 only.
COMMON = ("Q4_0", "W4A16", "Q4_K", "Q6_K")


def compiled(architecture: str) -> dict[str, static.Reading]:
    """Each binary once, under the name of its first call."""
    found, seen = {}, set()
    for name, launch, weight, rows in linear_kernels.launches():
        binary = (weight.scheme, tuple(sorted((key, str(value)) for key, value in launch.constants.items())))
        if binary not in seen and (architecture == "sm_86" or weight.scheme in COMMON):
            seen.add(binary)
            (found[name],) = static.read(linear_kernels.compile_launch(name, launch, weight, rows, architecture))
    return found


@pytest.fixture(scope="module", params=static.ARCHITECTURES)
def readings(request):
    return compiled(request.param)


def test_everything_fits(readings):
    for name, reading in readings.items():
        assert reading.shared_bytes <= CONSUMER_BYTES, f"{name}: {reading.shared_bytes} bytes"
        assert reading.stack_bytes == 0, f"{name}: {reading.stack_bytes} bytes of stack"
        assert reading.spill_instructions == 0, name


def test_codes_are_loaded_16_bytes_at_a_time(readings):
    for name, reading in readings.items():
        if "1 rows" in name:
            words = reading.kernel.loop_bytes and 64 * 16 * 4  # bytes of codes of a tile
            assert reading.main_loop.copies[16] * 16 * sass.LANES * reading.kernel.warps >= words, name


@pytest.mark.parametrize(("readings", "card"), [("sm_86", "rtx 3060"), ("sm_89", "rtx 4060")], indirect=["readings"])
def test_up_to_16_rows_are_bound_by_memory_on_paper(readings, card):
    """One binary serves 1 to 16 rows, so what it issues and multiplies is the same for all of them."""
    for scheme in COMMON:
        name = next(name for name in readings if f"linear {scheme} " in name and " 1 rows" in name)
        cost = static.predict(readings[name], cards.find(card))
        assert cost.binding[0] == "memory", f"{name}: {cost}"
