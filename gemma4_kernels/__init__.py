"""Fused kernels for Gemma 4: attention to head_dim 512, K-equals-V from a V-only cache, image blocks, quantised weights.

Importing this imports neither Triton nor a compiled module nor transformers; each is loaded at its first use.
"""

from gemma4_kernels._version import __version__
from gemma4_kernels.attention.api import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    k_eq_v_attention,
)
from gemma4_kernels.attention.prologue import k_eq_v_norm_rope_append, qkv_norm_rope_append
from gemma4_kernels.attention.ring import RingCache
from gemma4_kernels.backends import explain, use_backend
from gemma4_kernels.checks import (
    BackendError,
    DeviceError,
    DTypeError,
    FormatError,
    ShapeError,
    StrideError,
    WeightFileError,
)
from gemma4_kernels.geometry import GEMMA4_12B, GEMMA4_12B_DRAFTER
from gemma4_kernels.linear.api import quantized_argmax, quantized_embedding, quantized_geglu, quantized_linear
from gemma4_kernels.linear.files import open_weights
from gemma4_kernels.linear.modules import QuantizedEmbedding, QuantizedLinear
from gemma4_kernels.linear.replace import replace_linear
from gemma4_kernels.linear.weight import QuantizedWeight
from gemma4_kernels.norms.api import sandwich_norm
from gemma4_kernels.verification.api import VerifyResult, sample_tokens, verify_drafts

__all__ = [
    "GEMMA4_12B",
    "GEMMA4_12B_DRAFTER",
    "BackendError",
    "DTypeError",
    "DeviceError",
    "FormatError",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedWeight",
    "RingCache",
    "ShapeError",
    "StrideError",
    "VerifyResult",
    "WeightFileError",
    "__version__",
    "explain",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "k_eq_v_attention",
    "k_eq_v_norm_rope_append",
    "open_weights",
    "qkv_norm_rope_append",
    "quantized_argmax",
    "quantized_embedding",
    "quantized_geglu",
    "quantized_linear",
    "replace_linear",
    "sample_tokens",
    "sandwich_norm",
    "use_backend",
    "verify_drafts",
]
