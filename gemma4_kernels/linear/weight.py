"""`QuantizedWeight`: one class for the quantised weights of all formats, exact, in the order that kernels read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gemma4_kernels import checks
from gemma4_kernels.checks import DTypeError, ShapeError, WeightFileError
from gemma4_kernels.linear import planes, quantization, saving
from gemma4_kernels.linear.formats import awq, bitsandbytes, compressed_tensors, gguf, gptq, mlx
from gemma4_kernels.linear.schemes import SCHEMES, SUPER_BLOCK, Layout, Parts, check_sizes, expected_tensors

CLASS = "QuantizedWeight"
TENSORS = (
    "codes", "scales", "high", "offsets", "zeros", "group_scales", "table", "scale_table", "scale_scales",
    "scale_offset", "columns",
)  # fmt: skip
"""The fields that are tensors or None, in the order in which ops take them."""
_ALL = slice(None)


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedWeight:
    """A weight W of N rows (outputs) and K columns (inputs), quantised, as a linear layer uses it: x @ W.T.

    Made by the `from_` methods, `quantize` or `load`. Codes and scales are those of the source, bit for bit; only their
    order changes, by a permutation that `unpacked_codes` undoes. Group j holds the columns j * group_size up to
    (j + 1) * group_size. In fp32, in this order, with every step rounded once,

        W[n, k] = scale[n, j] * v            v = q - zero, q - zeros[n, j] or table[q]   ("centred", "zeros", "table")
        W[n, k] = scale[n, j] * q + offset[n, j]                                         ("offsets")

    `layout` says which, and how scale and offset are stored. All tensors are contiguous; S = K / 256, G = K / group_size:

        codes         int32 (N, K/8)      4 bits a code; of 8 neighbours, k stands at bit 16 * (k % 2) + 4 * (k // 2)
                      int8 (N, K)         8 bits a code, signed, in order
        high          int32 (N, K/32)     5-bit codes: the fifth bit; of 32 neighbours, k at 16 * (k % 2) + k // 2
                      int32 (N, K/16)     6-bit codes: the upper two; of 16 neighbours, k at 16 * (k % 2) + 2 * (k // 2)
        scales        (N, G)              "plain": the scale. fp16, bf16 or fp32 as in the source
                      (N, S) fp16         "int8" and "six_bit": d, the outer scale
                      (N, G) uint8        "e8m0": e; the scale is 2**(e - 128), and the table holds twice the values
                      (N, G) uint8        "nested": an index into scale_table
        group_scales  int8 (N, G)         "int8": scale = d * group_scales
                      int32 (N, S, 3)     "six_bit": of the 8 groups of 256 columns, i = 0 .. 7:
                                            s = (w0 >> 4i & 15) + 16 * (w2 >> 2i & 3)             scale = d * s
                                            m = (w1 >> 4i & 15) + 16 * (w2 >> (16 + 2i) & 3)      offset = -(dmin * m)
        offsets       as scales           "plain": the offset.  "six_bit": dmin (N, S) fp16
        zeros         uint8 (N, G)        zero points, 0 to 16
        table         fp32 (16,)
        scale_table   fp32 (256,)         "nested": scale = scale_table[scales[n, j]] * scale_scales[b] + scale_offset,
        scale_scales  fp32                b = (n * G + j) // 256
        scale_offset  fp32 (1,)
        columns       int32 (K,)          a permutation, or None for none: stored column p is column columns[p] of W, so
                                          x @ W.T is x[:, columns] times the stored columns

    For all schemes of GGUF scale * q, scale * table[q] and dmin * m are exact in fp32, so a fused multiply-add gives the
    same bits. That does not hold where scales are fp32.
    """

    scheme: str
    shape: tuple[int, int]
    group_size: int
    codes: Tensor
    scales: Tensor
    high: Tensor | None = None
    offsets: Tensor | None = None
    zeros: Tensor | None = None
    group_scales: Tensor | None = None
    table: Tensor | None = None
    scale_table: Tensor | None = None
    scale_scales: Tensor | None = None
    scale_offset: Tensor | None = None
    columns: Tensor | None = None
    name: str = ""
    """What messages call it, "blk.0.ffn_gate"."""

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ValueError(f"{CLASS}: scheme must be one of {', '.join(SCHEMES)}, got {self.scheme!r}")
        check_sizes(CLASS, self.scheme, self.shape, self.group_size)
        expected = expected_tensors(self.layout, self.shape, self.group_size)
        if self.columns is not None:
            expected["columns"] = ((self.shape[1],), (torch.int32,))
        present = self.tensors()
        if present.keys() != expected.keys():
            raise ValueError(f"{CLASS}: {self.scheme} has {', '.join(expected)}, got {', '.join(present)}")
        for name, (shape, dtypes) in expected.items():
            checks.has_shape(CLASS, name, present[name], shape)
            checks.has_dtype(CLASS, name, present[name], dtypes)
            if not planes.is_dense(present[name]):
                raise checks.StrideError(f"{CLASS}: {name} must be contiguous, got strides {present[name].stride()}")
        if self.offsets is not None:
            checks.has_dtype(CLASS, "offsets", self.offsets, (self.scales.dtype,))
        checks.same_device(CLASS, **present)

    # Constructors ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_gguf(cls, data: Tensor, type_name: str, shape: tuple[int, int], *, name: str = "") -> QuantizedWeight:
        """A tensor of a GGUF file.

        Args:
            data: uint8 (N, bytes of a row), the file's blocks.
            type_name: ggml's name of the type, "Q4_K".
            shape: (N, K). (ggml lists dims in reverse.)
            name: what messages call it.
        Raises: ShapeError, DTypeError; FormatError for a type that is not read here.
        """
        return cls._made(gguf.read(data, type_name, shape), name)

    @classmethod
    def from_compressed_tensors(
        cls, *, weight_packed: Tensor, weight_scale: Tensor, weight_shape: Tensor | tuple[int, int], group_size: int | None,
        weight_zero_point: Tensor | None = None, weight_g_idx: Tensor | None = None, name: str = "",
    ) -> QuantizedWeight:  # fmt: skip
        """A layer of a compressed-tensors file, "pack-quantized" with 4 bits.

        Args:
            weight_packed: int32 (N, K/8).
            weight_scale: (N, K/group_size) bf16, fp16 or fp32.
            weight_shape: (N, K), as a tensor of two integers or a tuple.
            group_size: columns of a group; None or -1 for one group a row.
            weight_zero_point: int32 (ceil(N/8), K/group_size), packed along N; None where the file is symmetric.
            weight_g_idx: (K,) int32 or int64, the group of each column; None where groups are neighbours.
            name: what messages call it.
        Raises: ShapeError, DTypeError, DeviceError, ValueError.
        """
        parts = compressed_tensors.read(
            weight_packed, weight_scale, weight_shape, group_size, weight_zero_point, weight_g_idx
        )
        return cls._made(parts, name)

    @classmethod
    def from_gptq(
        cls, *, qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None = None,
        checkpoint_format: str = "gptq", name: str = "",
    ) -> QuantizedWeight:  # fmt: skip
        """A layer of a GPTQ file with 4 bits, with or without act-order.

        Args:
            qweight: int32 (K/8, N), packed along K.
            qzeros: int32 (G, N/8), packed along N.
            scales: (G, N) fp16, bf16 or fp32; the group size is K / G.
            g_idx: (K,) int32 or int64, the group of each column; None where groups are neighbours.
            checkpoint_format: "gptq", whose files hold zero points less one, or "gptq_v2".
            name: what messages call it.
        Raises: ShapeError, DTypeError, DeviceError, ValueError.
        """
        return cls._made(gptq.read(qweight, qzeros, scales, g_idx, checkpoint_format), name)

    @classmethod
    def from_awq(cls, *, qweight: Tensor, qzeros: Tensor, scales: Tensor, name: str = "") -> QuantizedWeight:
        """A layer of an AWQ file of version "gemm" with 4 bits.

        Args:
            qweight: int32 (K, N/8), packed along N.
            qzeros: int32 (G, N/8), packed along N.
            scales: (G, N) fp16, bf16 or fp32; the group size is K / G.
            name: what messages call it.
        Raises: ShapeError, DTypeError, DeviceError, ValueError.
        """
        return cls._made(awq.read(qweight, qzeros, scales), name)

    @classmethod
    def from_bitsandbytes(
        cls, *, weight: Tensor, absmax: Tensor, quant_map: Tensor, quant_state: Tensor | dict[str, Any],
        nested_absmax: Tensor | None = None, nested_quant_map: Tensor | None = None, name: str = "",
    ) -> QuantizedWeight:  # fmt: skip
        """A layer of a bitsandbytes file with NF4 or FP4, nested (double quantised) or not.

        Args:
            weight: uint8 (N*K/2, 1) or any other shape of that many bytes.
            absmax: fp32 (N*K/blocksize,), uint8 where it is nested.
            quant_map: fp32 (16,).
            quant_state: "quant_state.bitsandbytes__nf4" of the file (uint8, JSON), or that JSON as a dict. Read are
                shape, blocksize, quant_type and, nested, nested_blocksize and nested_offset.
            nested_absmax: fp32 (ceil(N*K/blocksize/256),).
            nested_quant_map: fp32 (256,).
            name: what messages call it.
        Raises: ShapeError, DTypeError, DeviceError, ValueError. K must be a multiple of the block size: blocks that
            cross rows are not read.
        """
        parts = bitsandbytes.read(weight, absmax, quant_map, quant_state, nested_absmax, nested_quant_map)
        return cls._made(parts, name)

    @classmethod
    def from_mlx(
        cls, *, weight: Tensor, scales: Tensor, biases: Tensor, group_size: int, name: str = ""
    ) -> QuantizedWeight:
        """A layer of an MLX file, affine with 4 bits.

        Args:
            weight: uint32 or int32 (N, K/8).
            scales, biases: (N, K/group_size) fp16, bf16 or fp32.
            group_size: 32, 64 or 128.
            name: what messages call it.
        Raises: ShapeError, DTypeError, DeviceError, ValueError.
        """
        return cls._made(mlx.read(weight, scales, biases, group_size), name)

    @classmethod
    def quantize(cls, w: Tensor, scheme: str, *, name: str = "") -> QuantizedWeight:
        """A weight that is not quantised yet.

        A group that lies on a lattice already, as the groups of weights from quantisation-aware training do, gets the
        codes of that lattice: every value of it comes back in w's own dtype, bit for bit. Other groups are rounded to
        the nearest code, with a scale from their largest value.

        Args:
            w: (N, K) bf16, fp16 or fp32, finite, K a multiple of 32.
            scheme: "Q4_0" (fp16 scales), "W4A16" (scales in w's dtype) or "Q8_0", all with groups of 32.
            name: what messages call it.
        Raises: ShapeError, DTypeError, ValueError.
        """
        return cls._made(quantization.quantize(w, scheme), name)

    @classmethod
    def concatenate(cls, weights: Sequence[QuantizedWeight], *, name: str = "") -> QuantizedWeight:
        """One weight whose rows are those of several, in their order: q, k and v as one product. Nothing is rounded again.

        Compares values that the weights have to share (tables, permuted columns), so on a GPU it waits for the device: for
        the time when a model is loaded.

        Args:
            weights: of one scheme, K, group size and device, with tensors of the same dtypes, the same tables and the same
                columns. Nested: one scale serves 256 groups that lie in a row, so N * G must be a multiple of 256 in all but
                the last, and the nested scales must have one table and one offset.
            name: what messages call it.
        Raises: ShapeError, DTypeError, DeviceError, ValueError.
        """
        if not weights:
            raise ValueError(f"{CLASS}.concatenate: weights must hold at least one weight, got none")
        first = weights[0]
        for index, other in enumerate(weights):
            _check_alike(f"weights[{index}]", first, other)
        if first.layout.scales == "nested":
            for index, weight in enumerate(weights[:-1]):
                if weight.scales.numel() % SUPER_BLOCK:
                    N, G = weight.scales.shape
                    raise ValueError(
                        f"{CLASS}.concatenate: weights[{index}] must have a multiple of {SUPER_BLOCK} groups, which share a "
                        f"nested scale, or the next weight's groups would share its last one; got {N} x {G} = {N * G}"
                    )
        tensors = {
            field: tensor if field in _SHARED else torch.cat([weight.tensors()[field] for weight in weights])
            for field, tensor in first.tensors().items()
        }
        shape = (sum(weight.shape[0] for weight in weights), first.shape[1])
        return cls._made(Parts(first.scheme, shape, first.group_size, tensors), name)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> QuantizedWeight:
        """A weight that `save` wrote. Raises WeightFileError for any other file, pickles among them."""
        parts, name = saving.load(path)
        try:
            return cls._made(parts, name)
        except (TypeError, ValueError) as error:  # tensors that do not fit the metadata
            raise WeightFileError(f"{path}: {error}") from error

    @classmethod
    def from_checked(
        cls, scheme: str, shape: tuple[int, int], group_size: int, tensors: Sequence[Tensor | None], name: str = ""
    ) -> QuantizedWeight:
        """The fields of a weight put together again, `tensors` in the order of TENSORS; nothing is checked a second time."""
        weight = object.__new__(cls)
        given = {"scheme": scheme, "shape": shape, "group_size": group_size, "name": name}
        for field, value in (given | dict(zip(TENSORS, tensors, strict=True))).items():
            object.__setattr__(weight, field, value)
        return weight

    @classmethod
    def _made(cls, parts: Parts, name: str) -> QuantizedWeight:
        tensors = {field: planes.dense(tensor) for field, tensor in parts.tensors.items()}
        return cls(parts.scheme, parts.shape, parts.group_size, name=name, **tensors)  # type: ignore[arg-type]

    # What it is -----------------------------------------------------------------------------------------------------

    @property
    def layout(self) -> Layout:
        return SCHEMES[self.scheme]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in memory."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that it has, by the names of its fields."""
        found = {name: getattr(self, name) for name in TENSORS}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def is_stored_like(self, other: QuantizedWeight) -> bool:
        """Whether one kernel reads both at once. Permuted columns must be one tensor: comparing two would stall the stream."""
        return (
            self.shape == other.shape
            and self.layout == other.layout
            and self.group_size == other.group_size
            and self.scales.dtype == other.scales.dtype
            and self.columns is other.columns
        )

    def __repr__(self) -> str:
        named = f"{self.name!r}, " if self.name else ""
        return (
            f"QuantizedWeight({named}{self.scheme}, {self.shape[0]} x {self.shape[1]}, groups of {self.group_size}, "
            f"{self.bits_per_weight:.3f} bits a weight, {self.device})"
        )

    # What one does with it ------------------------------------------------------------------------------------------

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> QuantizedWeight:
        """The same weight on another device; itself if it is there already."""
        moved = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.tensors().items()}
        if all(tensor is getattr(self, name) for name, tensor in moved.items()):
            return self
        return replace(self, **moved)  # type: ignore[arg-type]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file that `load` reads: the fields as they are, and what else it knows as metadata."""
        saving.save(path, Parts(self.scheme, self.shape, self.group_size, self.tensors()), self.name)

    def unpacked_codes(self) -> Tensor:
        """(N, K) codes in the order of the stored columns, one to a byte: int8 for 8 bits, else uint8."""
        if self.layout.bits == 8:
            return self.codes.clone()
        return planes.join(self.codes, self.high, self.layout.bits)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W (N, K) in bf16, fp16 or fp32: computed in fp32 as the class says, then rounded once.

        Temporaries stay at a few MiB, whatever the size of the weight.
        Raises: DTypeError.
        """
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise DTypeError(f"{CLASS}.dequantize: dtype must be bfloat16, float16 or float32, got {dtype}")
        N, K = self.shape
        made = planes.by_rows(N, 4 * K, lambda first, last: {"w": self.rows(slice(first, last)).to(dtype)})
        return made["w"]

    def rows(self, rows: slice | Tensor) -> Tensor:
        """Some rows of W, fp32 (R, K): a slice of step 1, or their numbers (R,) int64, which must exist."""
        K = self.shape[1]
        bits = self.layout.bits
        if bits == 8:
            codes = self.codes[rows]
        else:
            codes = planes.join(self.codes[rows], None if self.high is None else self.high[rows], bits)
        codes = codes.view(codes.shape[0], K // self.group_size, self.group_size)  # (rows, G, group_size)
        scale = self.group_scale(rows)[:, :, None]
        if self.table is not None:
            values = scale * self.table[codes.int()]
        elif self.zeros is not None:
            values = scale * (codes.to(torch.int16) - self.zeros[rows, :, None]).float()
        elif self.offsets is not None:
            values = (scale * codes.float()).add_(self.group_offset(rows)[:, :, None])
        else:
            values = scale * (codes.to(torch.int16) - self.layout.zero).float()
        values = values.view(-1, K)
        if self.columns is None:
            return values
        restored = torch.empty_like(values)
        restored[:, self.columns.long()] = values
        return restored

    def group_scale(self, rows: slice | Tensor = _ALL) -> Tensor:
        """The scale of each group, fp32 (R, G); rows as in `rows`."""
        scales = self.scales[rows]
        if self.layout.scales == "int8":
            assert self.group_scales is not None
            inner = self.group_scales[rows].view(
                *scales.shape, SUPER_BLOCK // self.group_size
            )  # (rows, S, groups of 256 columns)
            return (scales.float()[:, :, None] * inner.float()).flatten(1)
        if self.layout.scales == "six_bit":
            return (scales.float()[:, :, None] * self._six_bits(rows, 0)).flatten(1)
        if self.layout.scales == "e8m0":
            # The bits of 2**(e - 128): an exponent, but for the two smallest, which are subnormal.
            e = scales.int()
            return torch.where(e < 2, 0x200000 << e, (e - 1) << 23).view(torch.float32)
        if self.layout.scales == "nested":
            assert self.scale_table is not None
            assert self.scale_scales is not None
            assert self.scale_offset is not None
            groups = scales.shape[1]
            row = torch.arange(self.shape[0], device=self.device)[rows]
            block = (row[:, None] * groups + torch.arange(groups, device=self.device)) // SUPER_BLOCK  # (R, G)
            looked_up = self.scale_table[scales.int()] * self.scale_scales[block]
            return looked_up + self.scale_offset
        return scales.float()

    def group_offset(self, rows: slice | Tensor = _ALL) -> Tensor:
        """The offset of each group of an "offsets" layout, fp32 (R, G); rows as in `rows`."""
        assert self.offsets is not None
        offsets = self.offsets[rows].float()
        if self.layout.scales != "six_bit":
            return offsets
        return -(offsets[:, :, None] * self._six_bits(rows, 1)).flatten(1)

    def _six_bits(self, rows: slice | Tensor, which: int) -> Tensor:
        """The 6-bit scales (which = 0) or minima (1) of the groups, fp32 (rows, S, 8)."""
        assert self.group_scales is not None
        words = self.group_scales[rows]
        step = torch.arange(8, dtype=torch.int32, device=self.device)
        low = (words[:, :, which, None] >> (4 * step)) & 15
        upper = (words[:, :, 2, None] >> (16 * which + 2 * step)) & 3
        return (low + 16 * upper).float()


# Fields without a row for each output.
_SHARED = ("table", "scale_table", "scale_offset", "columns")


def _check_alike(name: str, first: QuantizedWeight, other: QuantizedWeight) -> None:
    """That the rows of `other` may follow those of `first` in one weight."""
    function = f"{CLASS}.concatenate"
    for what, expected, got in (
        ("scheme", first.scheme, other.scheme),
        ("group_size", first.group_size, other.group_size),
    ):
        if got != expected:
            raise ValueError(f"{function}: {name} must have {what} {expected} as weights[0] has, got {got}")
    if other.shape[1] != first.shape[1]:
        raise ShapeError(f"{function}: {name} must have K = {first.shape[1]} as weights[0] has, got {other.shape[1]}")
    mine, theirs = first.tensors(), other.tensors()
    if mine.keys() != theirs.keys():  # within a scheme only columns may be absent
        with_columns = "weights[0]" if first.columns is not None else name
        raise ValueError(f"{function}: {name} must have columns if weights[0] has; only {with_columns} has them")
    for field, tensor in mine.items():
        checks.has_dtype(function, f"{name}.{field}", theirs[field], (tensor.dtype,))
    checks.same_device(function, **{"weights[0]": first.codes, name: other.codes})
    for field in _SHARED:
        if field in mine and not torch.equal(mine[field], theirs[field]):
            raise ValueError(f"{function}: {name} must have the {field} of weights[0], got another")
