"""Small files of weights, written byte by byte, so that a test can make any part of them wrong."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import torch
from linear_helpers import (
    awq_layer,
    bitsandbytes_layer,
    compressed_tensors_layer,
    gguf_rows,
    gptq_layer,
    mlx_layer,
)

TYPE_IDS = {"F32": 0, "Q4_0": 2, "Q2_K": 10, "Q4_K": 12, "Q6_K": 14, "Q8_0": 8, "BF16": 30}
DTYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
    torch.uint32: "U32", torch.uint8: "U8", torch.int16: "I16",
}  # fmt: skip


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def strings(values: list[str]) -> bytes:
    """An array of strings, as the value of a pair of kind 9."""
    return struct.pack("<IQ", 8, len(values)) + b"".join(map(text, values))


def gguf_file(
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]], *, pairs: list[bytes] | None = None, version: int = 3,
    alignment: int = 32, offsets: dict[str, int] | None = None, counts: tuple[int, int] | None = None,
) -> bytes:  # fmt: skip
    """tensors: name -> (type, (N, K), data). offsets and counts override what is right."""
    pairs = list(pairs or [pair("general.architecture", 8, text("gemma4"))])
    if alignment != 32:
        pairs.append(pair("general.alignment", 4, struct.pack("<I", alignment)))
    num_tensors, num_pairs = counts or (len(tensors), len(pairs))
    header = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_pairs) + b"".join(pairs)
    data = b""
    for name, (kind, shape, raw) in tensors.items():
        offset = (offsets or {}).get(name, len(data))
        number = TYPE_IDS[kind] if kind in TYPE_IDS else int(kind)
        sizes = struct.pack(f"<{len(shape)}Q", *shape[::-1])
        header += text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", number, offset)
        data += raw + bytes(-len(raw) % alignment)
    return header + bytes(-len(header) % alignment) + data


def small_gguf(**options: Any) -> bytes:
    tensors = {
        "blk.0.attn_q.weight": ("Q4_0", (4, 64), gguf_rows("Q4_0", 4, 64).tobytes()),
        "blk.0.attn_norm.weight": ("F32", (64,), np.arange(64, dtype=np.float32).tobytes()),
        "blk.0.ffn_up.weight": ("Q4_K", (2, 256), gguf_rows("Q4_K", 2, 256).tobytes()),
        "token_embd.weight": ("Q6_K", (3, 256), gguf_rows("Q6_K", 3, 256).tobytes()),
    }
    pairs = [
        pair("general.architecture", 8, text("gemma4")),
        pair("gemma4.block_count", 4, struct.pack("<I", 1)),
        pair("gemma4.attention.head_count_kv", 9, struct.pack("<IQ3i", 5, 3, 8, 8, 1)),
        pair("tokenizer.ggml.tokens", 9, strings(["<pad>", "a", "bc"])),
        pair("gemma4.final_logit_softcapping", 6, struct.pack("<f", 30.0)),
    ]
    return gguf_file(tensors, pairs=pairs, **options)


def safetensors_file(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)],
        }  # fmt: skip
        data += raw
    return with_header(json.dumps(header).encode(), data)


def with_header(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def named(prefix: str, tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a layer by their full names."""
    renamed = {}
    for name, tensor in tensors.items():
        if "quant_state" in tensors:  # bitsandbytes hangs everything on "X.weight"
            kind = json.loads(bytes(tensors["quant_state"].tolist()))["quant_type"]
            suffix = {"weight": "", "quant_state": f".quant_state.bitsandbytes__{kind}"}.get(name, f".{name}")
            renamed[f"{prefix}.weight{suffix}"] = tensor
        else:
            renamed[f"{prefix}.{name}"] = tensor
    return renamed


FOLDERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "W4A16": (compressed_tensors_layer(8, 64, 32), {"quantization_config": {"quant_method": "compressed-tensors"}}),
    "W4A16_ASYM": (compressed_tensors_layer(8, 64, 32, symmetric=False, act_order=True), {}),
    "GPTQ": (
        gptq_layer(8, 64, 32, version=2, act_order=True),
        {"quantization_config": {"bits": 4, "checkpoint_format": "gptq_v2"}},
    ),
    "AWQ": (awq_layer(8, 64, 32), {"quantization_config": {"bits": 4, "version": "GEMM"}}),
    "NF4": (bitsandbytes_layer(4, 64), {}),
    "FP4_NESTED": (bitsandbytes_layer(4, 64, kind="fp4", nested=True), {}),
    "MLX": (mlx_layer(4, 64, 64), {"quantization": {"bits": 4, "group_size": 64}}),
}
"""Scheme -> a layer, and the config.json beside it."""
