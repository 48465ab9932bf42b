"""The machine code of the compiled embedding, for cards that are not here: rounded operations, wide stores, no local memory."""

from __future__ import annotations

import re

import pytest
from budgets import assert_nothing_in_local_memory, compiled_cubins

from gemma4_kernels.bench import sass, static

_KERNEL = re.compile(r"embedding_kernelIN\w*?(Bf16|Fp16|Fp32)E")


@pytest.mark.parametrize("architecture", static.ARCHITECTURES)
def test_operations_are_rounded_one_by_one_and_rows_stored_16_bytes_at_a_time(architecture):
    found = {}
    for cubin in compiled_cubins(architecture, "embedding_kernel"):
        listings = sass.parse_listing(sass.disassemble(cubin))
        for reading in static.read(static.CompiledKernel("embedding", architecture, cubin)):
            assert_nothing_in_local_memory(reading.function, reading)
            found[_KERNEL.search(reading.function)[1]] = "\n".join(map(str, listings[reading.function]))
    assert found.keys() == {"Bf16", "Fp16", "Fp32"}
    for dtype, text in found.items():
        assert "FFMA" not in text, dtype
        assert len(re.findall(r"\bSTG\.E\S*\.128", text)) >= (2 if dtype == "Fp32" else 1), dtype
