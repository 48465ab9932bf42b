"""The machine code of the compiled embedding, for cards that are not here: rounded operations, wide stores, no local memory."""

from __future__ import annotations

import re
import subprocess
from importlib.util import find_spec

import pytest
from budgets import assert_nothing_in_local_memory

from gemma4_kernels.bench import sass, static

_found = find_spec("gemma4_kernels._C")
if _found is None or _found.origin is None:
    pytest.skip("gemma4_kernels._C is not built", allow_module_level=True)
if sass.cuobjdump() is None:
    pytest.skip("cuobjdump is not installed", allow_module_level=True)
MODULE = _found.origin
_KERNEL = re.compile(r"embedding_kernelIN\w*?(Bf16|Fp16|Fp32)E")


@pytest.mark.parametrize("architecture", static.ARCHITECTURES)
def test_operations_are_rounded_one_by_one_and_rows_stored_16_bytes_at_a_time(architecture, tmp_path):
    command = [sass.cuobjdump(), "-xelf", f"{architecture}.cubin", MODULE]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    found = {}
    for cubin in (path.read_bytes() for path in sorted(tmp_path.glob("*.cubin"))):
        if b"embedding_kernel" in cubin:
            listings = sass.parse_listing(sass.disassemble(cubin))
            for reading in static.read(static.CompiledKernel("embedding", architecture, cubin)):
                assert_nothing_in_local_memory(reading.function, reading)
                found[_KERNEL.search(reading.function)[1]] = "\n".join(map(str, listings[reading.function]))
    if not found:
        pytest.skip(f"the module has no machine code for {architecture}")
    assert found.keys() == {"Bf16", "Fp16", "Fp32"}
    for dtype, text in found.items():
        assert "FFMA" not in text, dtype
        assert len(re.findall(r"\bSTG\.E\S*\.128", text)) >= (2 if dtype == "Fp32" else 1), dtype
