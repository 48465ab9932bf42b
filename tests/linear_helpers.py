"""Weights as files hold them, made from random codes and scales, with W worked out one value at a time.

The loops follow the descriptions of the formats, word by word and nibble by nibble, and share nothing with the package.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# values, bytes of a block, and where its fp16 numbers stand
GGUF_BLOCKS = {
    "Q4_0": (32, 18, (0,)),
    "Q4_1": (32, 20, (0, 2)),
    "Q5_0": (32, 22, (0,)),
    "Q5_1": (32, 24, (0, 2)),
    "Q8_0": (32, 34, (0,)),
    "Q4_K": (256, 144, (0, 2)),
    "Q5_K": (256, 176, (0, 2)),
    "Q6_K": (256, 210, (208,)),
    "IQ4_NL": (32, 18, (0,)),
    "IQ4_XS": (256, 136, (0,)),
    "MXFP4": (32, 17, ()),
}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Layer(NamedTuple):
    """The tensors of one layer by the names in their files, and the W that they mean, fp32 (N, K)."""

    tensors: dict[str, Any]
    w: np.ndarray


def gguf_rows(type_name: str, N: int, K: int, seed: int = 0) -> np.ndarray:
    """Random blocks, uint8 (N, bytes of a row): every bit pattern of codes and inner scales, finite fp16 numbers."""
    generator = np.random.default_rng(seed)
    values, size, halves = GGUF_BLOCKS[type_name]
    blocks = generator.integers(0, 256, (N, K // values, size), dtype=np.uint8)
    for start in halves:
        numbers = generator.normal(0, 0.02, (N, K // values, 1)).astype(np.float16)
        numbers[0, 0] = 6e-8  # the smallest subnormal
        blocks[:, :, start : start + 2] = numbers.view(np.uint8)
    return blocks.reshape(N, -1)


def same_bits(got: Tensor, expected: np.ndarray) -> bool:
    return got.dtype == torch.float32 and np.array_equal(got.numpy().view(np.int32), expected.view(np.int32))


def pack_words(codes: np.ndarray, order: tuple[int, ...] = tuple(range(8))) -> np.ndarray:
    """Eight codes of the last axis to an int32 word; nibble i holds code order[i]."""
    words = np.zeros((*codes.shape[:-1], codes.shape[-1] // 8), dtype=np.uint32)
    for index in np.ndindex(words.shape):
        for i in range(8):
            words[index] |= np.uint32(int(codes[(*index[:-1], 8 * index[-1] + order[i])]) << (4 * i))
    return words.view(np.int32)


def _random(generator: np.random.Generator, N: int, K: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    codes = generator.integers(0, 16, (N, K))
    scales = generator.normal(0, 0.02, (N, K // group)).astype(np.float32)
    return codes, scales


def _as(scales: np.ndarray, dtype: torch.dtype) -> tuple[Tensor, np.ndarray]:
    """Scales in the dtype of the file, and what they mean in fp32."""
    stored = torch.from_numpy(np.ascontiguousarray(scales)).to(dtype)
    return stored, stored.float().numpy()


def _affine(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, group_of: np.ndarray) -> np.ndarray:
    w = np.zeros(codes.shape, dtype=np.float32)
    for n, k in np.ndindex(codes.shape):
        j = group_of[k]
        w[n, k] = scales[n, j] * np.float32(int(codes[n, k]) - int(zeros[n, j]))
    return w


def _groups(generator: np.random.Generator, K: int, group: int, act_order: bool) -> np.ndarray:
    group_of = np.arange(K) // group
    return generator.permutation(group_of) if act_order else group_of


def compressed_tensors_layer(
    N: int, K: int, group: int, *, symmetric: bool = True, act_order: bool = False, dtype=torch.bfloat16, seed: int = 0
) -> Layer:
    generator = np.random.default_rng(seed)
    codes, scales = _random(generator, N, K, group)
    stored, scales = _as(scales, dtype)
    zeros = np.full(scales.shape, 8) if symmetric else generator.integers(0, 16, scales.shape)
    group_of = _groups(generator, K, group, act_order)
    tensors: dict[str, Any] = {
        "weight_packed": torch.from_numpy(pack_words(codes)),
        "weight_scale": stored,
        "weight_shape": torch.tensor([N, K]),
    }
    if not symmetric:
        padded = np.zeros((-(-N // 8) * 8, scales.shape[1]), dtype=np.int64)
        padded[:N] = zeros
        tensors["weight_zero_point"] = torch.from_numpy(np.ascontiguousarray(pack_words(padded.T).T))
    if act_order:
        tensors["weight_g_idx"] = torch.from_numpy(group_of.astype(np.int32))
    return Layer(tensors, _affine(codes, scales, zeros, group_of))


def gptq_layer(N: int, K: int, group: int, *, version: int = 1, act_order: bool = False, seed: int = 0) -> Layer:
    generator = np.random.default_rng(seed)
    codes, scales = _random(generator, N, K, group)
    stored, scales = _as(scales, torch.float16)
    held = generator.integers(0, 16, scales.shape)  # what the file holds: all 16 patterns
    group_of = _groups(generator, K, group, act_order)
    tensors = {
        "qweight": torch.from_numpy(np.ascontiguousarray(pack_words(codes).T)),
        "qzeros": torch.from_numpy(pack_words(np.ascontiguousarray(held.T))),
        "scales": stored.T.contiguous(),
        "g_idx": torch.from_numpy(group_of.astype(np.int32)),
    }
    return Layer(tensors, _affine(codes, scales, held + (version == 1), group_of))


def awq_layer(N: int, K: int, group: int, seed: int = 0) -> Layer:
    generator = np.random.default_rng(seed)
    codes, scales = _random(generator, N, K, group)
    stored, scales = _as(scales, torch.float16)
    zeros = generator.integers(0, 16, scales.shape)
    tensors = {
        "qweight": torch.from_numpy(pack_words(codes.T, AWQ_ORDER)),
        "qzeros": torch.from_numpy(pack_words(zeros.T, AWQ_ORDER)),
        "scales": stored.T.contiguous(),
    }
    return Layer(tensors, _affine(codes, scales, zeros, np.arange(K) // group))


def mlx_layer(N: int, K: int, group: int, dtype=torch.bfloat16, seed: int = 0) -> Layer:
    generator = np.random.default_rng(seed)
    codes, scales = _random(generator, N, K, group)
    stored, scales = _as(scales, dtype)
    biases, offsets = _as(generator.normal(0, 0.1, scales.shape).astype(np.float32), dtype)
    w = np.zeros((N, K), dtype=np.float32)
    for n, k in np.ndindex(w.shape):
        w[n, k] = scales[n, k // group] * np.float32(codes[n, k]) + offsets[n, k // group]
    tensors = {"weight": torch.from_numpy(pack_words(codes)).view(torch.uint32), "scales": stored, "biases": biases}
    return Layer(tensors, w)


def bitsandbytes_layer(
    N: int, K: int, block: int = 64, *, kind: str = "nf4", nested: bool = False, seed: int = 0
) -> Layer:
    generator = np.random.default_rng(seed)
    codes = generator.integers(0, 16, N * K)
    table = np.sort(generator.uniform(-1, 1, 16)).astype(np.float32)
    packed = np.zeros(N * K // 2, dtype=np.uint8)
    for i, code in enumerate(codes):
        packed[i // 2] |= int(code) << (4 if i % 2 == 0 else 0)
    state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": [N, K]}
    tensors: dict[str, Any] = {"weight": torch.from_numpy(packed)[:, None], "quant_map": torch.from_numpy(table)}
    blocks = N * K // block
    if nested:
        held = generator.integers(0, 256, blocks).astype(np.uint8)
        outer_table = np.sort(generator.uniform(-1, 1, 256)).astype(np.float32)
        outer = generator.uniform(0.01, 0.1, -(-blocks // 256)).astype(np.float32)
        state |= {"nested_blocksize": 256, "nested_offset": 0.0625, "nested_dtype": "float32"}
        absmax = np.zeros(blocks, dtype=np.float32)
        for i in range(blocks):
            absmax[i] = outer_table[held[i]] * outer[i // 256] + np.float32(0.0625)
        tensors |= {"absmax": held, "nested_absmax": outer, "nested_quant_map": outer_table}
        tensors |= {name: torch.from_numpy(tensors[name]) for name in ("absmax", "nested_absmax", "nested_quant_map")}
    else:
        absmax = generator.uniform(0.01, 0.1, blocks).astype(np.float32)
        tensors["absmax"] = torch.from_numpy(absmax)
    tensors["quant_state"] = torch.from_numpy(np.frombuffer(json.dumps(state).encode(), dtype=np.uint8).copy())
    w = np.zeros(N * K, dtype=np.float32)
    for i, code in enumerate(codes):
        w[i] = table[code] * absmax[i // block]
    return Layer(tensors, w.reshape(N, K))
