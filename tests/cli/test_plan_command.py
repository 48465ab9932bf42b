"""`gemma4-kernels info --plan`: the memory that a model takes, from a file's headers or from names."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from linear_helpers import compressed_tensors_layer, gguf_rows
from weight_files import gguf_file, named, pair, safetensors_file, small_gguf, text


def number(key: str, value: int) -> bytes:
    return pair(key, 4, struct.pack("<I", value))


def model_gguf() -> bytes:
    """A sliding layer of 2 x 8 with values of its own, and a full one of 1 x 16 without; 4 query heads."""

    def matrix(rows: int, scheme: str = "Q4_0"):
        return scheme, (rows, 64), gguf_rows(scheme, rows, 64).tobytes()

    def norm(size: int):
        return "F32", (size,), bytes(4 * size)

    tensors = {"token_embd.weight": matrix(40, "Q8_0"), "output_norm.weight": norm(64)}
    for index, dim in ((0, 8), (1, 16)):
        tensors |= {
            f"blk.{index}.attn_q.weight": matrix(4 * dim), f"blk.{index}.attn_k.weight": matrix(16),
            f"blk.{index}.attn_k_norm.weight": norm(dim), f"blk.{index}.ffn_up.weight": matrix(128),
        }  # fmt: skip
    tensors["blk.0.attn_v.weight"] = matrix(16)
    pairs = [
        pair("general.architecture", 8, text("gemma4")), number("gemma4.context_length", 4096),
        number("gemma4.attention.sliding_window", 32),
    ]  # fmt: skip
    return gguf_file(tensors, pairs=pairs)


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(model_gguf())
    return path


def test_a_file_is_planned_from_its_header(command, model):
    found = json.loads(command(f"gemma4-kernels info --json --plan {model} --context 100 --chunk 16").out)
    items = {item["name"]: item["nbytes"] for item in found["items"]}
    assert items["Q4_0"] == (32 + 64 + 16 + 16 + 128 + 128 + 16) * 64 * 18 // 32
    assert items["Q8_0"] == 40 * 64 * 34 // 32
    assert items["F32"] == 4 * (64 + 8 + 16)
    assert items["1 full layers"] == 128 * 16 * 2 + 2 * 4
    assert items["1 sliding layers"] == 2 * 48 * 2 * 8 * 2 + 7 * 4
    assert found["cache"] == "bf16"
    assert found["bytes"] == sum(items.values())
    assert [form["form"] for form in found["forms"]] == ["bf16", "fp8", "int8", "both"]


def test_a_folder_of_safetensors_is_planned_and_its_tied_head_counted_once(command, tmp_path):
    def tensors(name, rows):
        return named(f"model.language_model.layers.0.{name}", compressed_tensors_layer(rows, 64, 32).tensors)

    head = torch.zeros(40, 64, dtype=torch.bfloat16)
    raw = safetensors_file({
        "model.language_model.embed_tokens.weight": head, "lm_head.weight": head,
        "model.language_model.layers.0.self_attn.k_norm.weight": torch.ones(8),
        **{f"model.vision_tower.layers.7.self_attn.{name}.weight": torch.zeros(16, 5) for name in ("q_proj", "k_proj")},
        "model.vision_tower.layers.7.self_attn.k_norm.weight": torch.ones(4),
        **tensors("self_attn.q_proj", 32), **tensors("self_attn.k_proj", 16), **tensors("mlp.up_proj", 128),
    })  # fmt: skip
    (tmp_path / "model.safetensors").write_bytes(raw)
    inner = {"sliding_window": 16, "max_position_embeddings": 512}
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": True, "text_config": inner}))
    found = json.loads(command(f"gemma4-kernels info --json --plan {tmp_path}").out)
    items = {item["name"]: item["nbytes"] for item in found["items"]}
    assert items["BF16"] == 40 * 64 * 2
    assert found["context"] == 512
    assert [name for name in items if name.endswith("layers")] == ["1 sliding layers"]


def test_names_stand_for_a_model_that_is_not_here(command):
    answer = command("gemma4-kernels info --plan '12B:Q4_0+Q6_K head' --card 'RTX 3060'")
    assert answer.status == 0
    assert "fits into the 12.00 GiB of RTX 3060" in answer.out
    (both,) = [line for line in answer.out.splitlines() if "keys and values, 16 bits" in line and "rows of" not in line]
    assert 0 < int(both.split()[-1]) < 262144
    without = command("gemma4-kernels info --plan 12B:Q4_0 --drafter 12B-DRAFTER:Q4_0 --memory 8GiB").out
    assert "does not fit" in without


def test_the_longest_context_grows_with_the_memory(command, model):
    def longest(memory: str) -> int:
        line = f"gemma4-kernels info --json --plan {model} --memory {memory} --reserve 0MiB --cache int8"
        (form,) = [form for form in json.loads(command(line).out)["forms"] if form["form"] == "int8"]
        return form["longest"]

    found = [longest(memory) for memory in ("0.1MiB", "3MB", "4GiB")]
    assert found == sorted(found)
    assert (found[0], found[-1]) == (0, 4096)


def test_what_cannot_be_planned_is_one_line_and_status_1(command, model, tmp_path):
    (tmp_path / "other.gguf").write_bytes(small_gguf())
    for arguments, said in (
        (f"{tmp_path}/absent", "neither a file nor a folder"), (f"{tmp_path}/other.gguf", "no layers with queries"),
        ("12B:Q3", "scheme must be one of"), ("12B:Q4_0 --context 300000", "at most 262144"),
        ("12B:Q4_0 --memory 12", "--memory must be a size"), ("12B:Q4_0 --card 'RTX 4060 Ti'", "8 and 16 GiB"),
        ("12B:Q4_0 --card 'RTX 1'", "'RTX 1'"), (f"{model} --batch 0", "batch"),
        (f"12B:Q4_0 --drafter {tmp_path}/absent", "neither a file nor a folder"),
        ("12B-DRAFTER:Q4_0", "goes beside a model"), ("12B:Q4_0 --batch 100000000000", "at most"),
        ("12B:Q4_0 --chunk 3000000", "at most"),
    ):  # fmt: skip
        answer = command(f"gemma4-kernels info --plan {arguments}")
        assert answer.status == 1, arguments
        assert answer.out == ""
        assert len(answer.err.splitlines()) == 1
        assert answer.err.startswith("gemma4-kernels info: ")
        assert said in answer.err


def test_an_option_of_a_plan_without_a_plan_is_said(command):
    answer = command("gemma4-kernels info --card 'RTX 3060'")
    assert (answer.status, answer.out) == (1, "")
    assert answer.err == "gemma4-kernels info: --card goes with --plan\n"


@pytest.mark.parametrize("shape", [(7, 64), (64,), (0, 64)])
def test_layers_that_make_no_sense_are_refused(command, tmp_path, shape):
    """Fewer keys than a head has, or no matrix at all."""
    tensors = {
        "embed_tokens.weight": torch.zeros(3, 64), "layers.0.self_attn.q_proj.weight": torch.zeros(16, 64),
        "layers.0.self_attn.k_proj.weight": torch.zeros(shape), "layers.0.self_attn.k_norm.weight": torch.ones(8),
    }  # fmt: skip
    (tmp_path / "model.safetensors").write_bytes(safetensors_file(tensors))
    (tmp_path / "config.json").write_text(json.dumps({"sliding_window": 16, "max_position_embeddings": 512}))
    answer = command(f"gemma4-kernels info --plan {tmp_path}")
    assert answer.status == 1
    assert "is it a Gemma model?" in answer.err
