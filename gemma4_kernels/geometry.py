"""The shapes of the Gemma 4 family: head counts, head dims, windows, kinds of layers.

Kernels never read these constants: they take every size from the call. Bench cases, the reference model, and callers
that allocate caches do. Sources: the configuration classes of transformers 5.23 (`gemma4_unified`, `gemma4`, and their
assistants) and the `config.json` of each released checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypedDict

LayerKind = Literal["sliding", "full"]
LAYER_TYPE: dict[LayerKind, str] = {"sliding": "sliding_attention", "full": "full_attention"}
"""What transformers calls the two kinds of layers, in configurations, masks and shared keys and values."""
KIND_OF: dict[str, LayerKind] = {layer_type: kind for kind, layer_type in LAYER_TYPE.items()}


@dataclass(frozen=True)
class AttentionGeometry:
    """Attention of one kind of layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    """Keys a token may see, itself included; None: all of them."""
    k_eq_v: bool
    """The layer has no v_proj: values are the raw keys, normed without a weight."""
    rope_theta: float
    rope_fraction: float
    """Share of the D/2 rotation pairs whose frequency is not zero ("partial_rotary_factor")."""

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def window_size(self) -> tuple[int, int]:
        """The window in FlashAttention's terms: neighbours to the left and to the right."""
        return (-1, -1) if self.window is None else (self.window - 1, 0)


@dataclass(frozen=True)
class ModelGeometry:
    """One text model. `pattern` repeats over the layers."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    pattern: tuple[LayerKind, ...]
    sliding: AttentionGeometry
    full: AttentionGeometry
    vocab_size: int
    final_softcap: float | None
    max_context: int
    num_kv_shared_layers: int = 0
    """Trailing layers that own no keys and values and read those of an earlier layer."""

    @property
    def layers(self) -> tuple[LayerKind, ...]:
        repeats = -(-self.num_layers // len(self.pattern))
        return (self.pattern * repeats)[: self.num_layers]

    def attention(self, kind: LayerKind) -> AttentionGeometry:
        return self.sliding if kind == "sliding" else self.full

    def count(self, kind: LayerKind) -> int:
        return self.layers.count(kind)


class _BothKinds(TypedDict):
    sliding: AttentionGeometry
    full: AttentionGeometry


def _attention(heads: int, sliding_kv: int, full_kv: int, window: int, k_eq_v: bool) -> _BothKinds:
    """Both kinds of layers of a family member; head dims, RoPE bases and the rotated quarter are common to all."""
    return {
        "sliding": AttentionGeometry(heads, sliding_kv, 256, window, False, 1e4, 1.0),
        "full": AttentionGeometry(heads, full_kv, 512, None, k_eq_v, 1e6, 0.25),
    }


_FIVE_TO_ONE: tuple[LayerKind, ...] = ("sliding",) * 5 + ("full",)
_FOUR_TO_ONE: tuple[LayerKind, ...] = ("sliding",) * 4 + ("full",)

GEMMA4_12B = ModelGeometry(
    name="Gemma 4 12B", hidden_size=3840, intermediate_size=15360, num_layers=48, pattern=_FIVE_TO_ONE,
    **_attention(heads=16, sliding_kv=8, full_kv=1, window=1024, k_eq_v=True),
    vocab_size=262144, final_softcap=30.0, max_context=262144,
)  # fmt: skip

# Q only: its layers read the keys and values of the target's last sliding and last full layer.
GEMMA4_12B_DRAFTER = ModelGeometry(
    name="Gemma 4 12B drafter", hidden_size=1024, intermediate_size=8192, num_layers=4,
    pattern=("sliding", "sliding", "sliding", "full"),
    **_attention(heads=16, sliding_kv=8, full_kv=1, window=1024, k_eq_v=True),
    vocab_size=262144, final_softcap=None, max_context=262144, num_kv_shared_layers=4,
)  # fmt: skip

GEMMA4_E2B = ModelGeometry(
    name="Gemma 4 E2B", hidden_size=1536, intermediate_size=6144, num_layers=35, pattern=_FOUR_TO_ONE,
    **_attention(heads=8, sliding_kv=1, full_kv=1, window=512, k_eq_v=False),
    vocab_size=262144, final_softcap=30.0, max_context=131072, num_kv_shared_layers=20,
)  # fmt: skip

GEMMA4_E4B = ModelGeometry(
    name="Gemma 4 E4B", hidden_size=2560, intermediate_size=10240, num_layers=42, pattern=_FIVE_TO_ONE,
    **_attention(heads=8, sliding_kv=2, full_kv=2, window=512, k_eq_v=False),
    vocab_size=262144, final_softcap=30.0, max_context=131072, num_kv_shared_layers=18,
)  # fmt: skip

GEMMA4_26B_A4B = ModelGeometry(
    name="Gemma 4 26B-A4B", hidden_size=2816, intermediate_size=2112, num_layers=30, pattern=_FIVE_TO_ONE,
    **_attention(heads=16, sliding_kv=8, full_kv=2, window=1024, k_eq_v=True),
    vocab_size=262144, final_softcap=30.0, max_context=262144,
)  # fmt: skip

GEMMA4_31B = ModelGeometry(
    name="Gemma 4 31B", hidden_size=5376, intermediate_size=21504, num_layers=60, pattern=_FIVE_TO_ONE,
    **_attention(heads=32, sliding_kv=16, full_kv=4, window=1024, k_eq_v=True),
    vocab_size=262144, final_softcap=30.0, max_context=262144,
)  # fmt: skip

FAMILY = (GEMMA4_12B, GEMMA4_12B_DRAFTER, GEMMA4_E2B, GEMMA4_E4B, GEMMA4_26B_A4B, GEMMA4_31B)
