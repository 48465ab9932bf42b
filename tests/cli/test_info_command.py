"""`gemma4-kernels info --model`: what is in a model, from its headers."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from weight_files import FOLDERS, named, safetensors_file, small_gguf


def test_a_gguf_file_is_shown_scheme_by_scheme(command, tmp_path):
    (tmp_path / "m.gguf").write_bytes(small_gguf())
    answer = command(f"gemma4-kernels info --model {tmp_path}/m.gguf")
    assert answer.status == 0
    lines = answer.out.splitlines()
    assert lines[0] == f"{tmp_path}/m.gguf: gemma4, gguf"
    assert [line.split()[:3] for line in lines[2:]] == [
        ["scheme", "tensors", "parameters"], ["Q6_K", "1", "768"], ["Q4_K", "1", "512"], ["F32", "1", "64"],
        ["Q4_0", "1", "256"], ["all", "4", "1600"],
    ]  # fmt: skip
    assert "4.500" in lines[-2]
    assert "blk.0.attn_q.weight 4 x 64" in lines[-2]


def test_json_lists_each_tensor(command, tmp_path):
    layer, config = FOLDERS["W4A16"]
    raw = safetensors_file({**named("up", layer.tensors), "norm.weight": torch.ones(3)})
    (tmp_path / "model.safetensors").write_bytes(raw)
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = json.loads(command(f"gemma4-kernels info --json --model {tmp_path}").out)
    assert found["format"] == "safetensors"
    assert found["bytes"] == 8 * 64 // 2 + 8 * 2 * 2 + 16 + 12
    assert [(tensor["name"], tensor["scheme"], tensor["shape"]) for tensor in found["tensors"]] == [
        ("up.weight", "W4A16", [8, 64]), ("norm.weight", "F32", [3]),
    ]  # fmt: skip


def test_json_stays_json_whatever_the_metadata(command, tmp_path):
    raw = small_gguf().replace(struct.pack("<f", 30.0), struct.pack("<f", float("nan")), 1)
    (tmp_path / "m.gguf").write_bytes(raw)
    out = command(f"gemma4-kernels info --json --model {tmp_path}/m.gguf").out
    assert json.loads(out, parse_constant=pytest.fail)["metadata"]["gemma4.final_logit_softcapping"] == "nan"


def test_what_is_not_read_says_what_to_use_instead(command, tmp_path):
    raw = safetensors_file({"a.trellis": torch.zeros(4, 2, 64, dtype=torch.int16)})
    (tmp_path / "m.safetensors").write_bytes(raw)
    out = command(f"gemma4-kernels info --model {tmp_path}").out
    assert "not read: EXL3: EXL3 (trellis codes) is not read; use a Q4_0 or Q4_K_M GGUF file" in out


def test_a_model_of_ollama_is_found_by_its_name(command, tmp_path, monkeypatch):
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    manifest = tmp_path / "manifests/registry.ollama.ai/library/gemma4/12b"
    manifest.parent.mkdir(parents=True)
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:" + "0" * 64}
    manifest.write_text(json.dumps({"layers": [layer]}))
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / f"sha256-{'0' * 64}").write_bytes(small_gguf())
    answer = command("gemma4-kernels info --model ollama:gemma4:12b")
    assert answer.out.splitlines()[0] == "ollama:gemma4:12b: gemma4, gguf"
    assert answer.out.splitlines()[1].strip() == str(tmp_path / "blobs" / f"sha256-{'0' * 64}")


def test_a_model_that_cannot_be_read_is_one_line_and_status_1(command, tmp_path):
    (tmp_path / "m.gguf").write_bytes(small_gguf()[:300])
    for model in (f"{tmp_path}/m.gguf", f"{tmp_path}/absent", "ollama:../x", f"{tmp_path}"):
        answer = command(f"gemma4-kernels info --model {model}")
        assert answer.status == 1
        assert answer.out == ""
        assert len(answer.err.splitlines()) == 1
        assert answer.err.startswith("gemma4-kernels info: ")


def test_names_from_a_file_cannot_move_the_cursor_or_break_the_output(command, tmp_path):
    (tmp_path / "m.safetensors").write_bytes(safetensors_file({"a\x1b[2J\n\ud800": torch.ones(3)}))
    out = command(f"gemma4-kernels info --model {tmp_path}").out
    assert "a?[2J?? 3" in out
    (tmp_path / "m.safetensors").write_bytes(safetensors_file({"a\x1b\ud800": torch.ones(3)})[:-1])
    assert command(f"gemma4-kernels info --model {tmp_path}").err.rstrip("\n").isprintable()
