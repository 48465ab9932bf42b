"""What a drafter must know about itself, as plain data, from a config.json or from a configuration object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gemma4_kernels.attention.ops import MAX_HEAD_DIM
from gemma4_kernels.geometry import KIND_OF, AttentionGeometry, LayerKind

# What a config.json may leave out: defaults that all of transformers' Gemma 4 text configurations have in common.
_ROPE: dict[str, dict[str, Any]] = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}
_FULL_HEAD_DIM = 512
_LARGEST = 2**24
"""No size of a model is beyond this; a file that says so is not believed."""


@dataclass(frozen=True)
class DrafterConfig:
    """Layers that own no keys and values, between two projections to the target's width."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    target_hidden_size: int
    layers: tuple[LayerKind, ...]
    sliding: AttentionGeometry
    full: AttentionGeometry
    eps: float = 1e-6
    tied_head: bool = True
    """lm_head is model.embed_tokens, the drafter's own table. Where it is not, there is no embed_tokens: nothing reads it."""
    num_centroids: int | None = None
    """Clusters of the vocabulary that the head chooses among first; None: a dense head."""
    centroid_top_k: int = 32

    def __post_init__(self) -> None:
        sizes = {
            "vocab_size": self.vocab_size, "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size, "backbone_hidden_size": self.target_hidden_size,
        }  # fmt: skip
        for name, size in sizes.items():
            _whole(name, size, _LARGEST)
        if not self.layers:
            raise ValueError("layer_types: expected at least one layer, got none")
        for kind in self.layers:
            geometry = self.attention(kind)
            _whole(f"head_dim of {kind} layers", geometry.head_dim, MAX_HEAD_DIM)
            _whole(f"num_attention_heads of {kind} layers", geometry.num_heads, _LARGEST)
            _whole(f"num_key_value_heads of {kind} layers", geometry.num_kv_heads, geometry.num_heads)
            if geometry.head_dim % 2 or geometry.num_heads % geometry.num_kv_heads:
                raise ValueError(
                    f"{kind} layers: expected an even head_dim and whole groups of query heads, got {geometry}"
                )
        _whole("sliding_window", self.sliding.window, 2**31 - 2)
        if self.num_centroids is not None:
            _whole("num_centroids", self.num_centroids, self.vocab_size)
            _whole("centroid_intermediate_top_k", self.centroid_top_k, self.num_centroids)
            if self.vocab_size % self.num_centroids:
                raise ValueError(
                    f"num_centroids: expected a divisor of vocab_size {self.vocab_size}, got {self.num_centroids}"
                )

    @property
    def window(self) -> int:
        """The target's: keys that a token of a sliding layer sees, itself included."""
        assert self.sliding.window is not None  # __post_init__ checks it
        return self.sliding.window

    def attention(self, kind: LayerKind) -> AttentionGeometry:
        return self.sliding if kind == "sliding" else self.full

    @classmethod
    def from_config(cls, config: Any) -> DrafterConfig:
        """From transformers' configuration of an assistant (an object, or its dict as in config.json), or from the
        reference's.

        Raises: ValueError for what is missing or not computed here, TypeError for what is no configuration.
        """
        if isinstance(config, cls):
            return config
        if isinstance(config, Mapping):
            return cls._from_dict(config)
        if hasattr(config, "text_config") and hasattr(config, "to_dict"):
            return cls._from_dict(config.to_dict())
        if hasattr(config, "text") and hasattr(config, "target_hidden_size"):
            text = config.text
            return cls(
                vocab_size=text.vocab_size, hidden_size=text.hidden_size,
                intermediate_size=text.intermediate_size * (2 if text.double_wide_mlp else 1),
                target_hidden_size=config.target_hidden_size, layers=text.layers, sliding=text.sliding, full=text.full,
                eps=text.eps, tied_head=text.tied_head, num_centroids=config.num_centroids,
                centroid_top_k=config.centroid_top_k,
            )  # fmt: skip
        raise TypeError(f"DrafterConfig: config must be a configuration of an assistant, got {type(config).__name__}")

    @classmethod
    def _from_dict(cls, config: Mapping[str, Any]) -> DrafterConfig:
        text = _need(config, "text_config")
        if not isinstance(text, Mapping):
            raise ValueError(f"text_config: expected an object, got {type(text).__name__}")
        _refuse_unknown(text)
        layer_types = _need(text, "layer_types")
        known = isinstance(layer_types, (list, tuple)) and all(
            isinstance(name, str) and name in KIND_OF for name in layer_types
        )
        if not known or not layer_types:
            raise ValueError(f"layer_types: expected a list of {' and '.join(KIND_OF)}, got {str(layer_types)[:80]}")
        if text.get("num_kv_shared_layers") not in (None, 0, len(layer_types)):
            raise ValueError(
                f"num_kv_shared_layers: expected {len(layer_types)}, all layers, got {str(text['num_kv_shared_layers'])[:40]}"
            )
        sizes = [_sizes(text, layer, layer_types[layer]) for layer in range(len(layer_types))]
        wide = 2 if text.get("use_double_wide_mlp") else 1
        return cls(
            vocab_size=_need(text, "vocab_size"),
            hidden_size=_need(text, "hidden_size"),
            intermediate_size=wide * _whole("intermediate_size", _need(text, "intermediate_size"), _LARGEST),
            target_hidden_size=_need(config, "backbone_hidden_size"),
            layers=tuple(KIND_OF[name] for name in layer_types),
            sliding=_geometry(text, layer_types, sizes, "sliding_attention"),
            full=_geometry(text, layer_types, sizes, "full_attention"),
            eps=_positive("rms_norm_eps", text.get("rms_norm_eps", 1e-6)),
            tied_head=bool(config.get("tie_word_embeddings", True)),
            num_centroids=_need(config, "num_centroids") if config.get("use_ordered_embeddings") else None,
            centroid_top_k=config.get("centroid_intermediate_top_k", 32),
        )


# The parts of a dict ------------------------------------------------------------------------------------------------


def _need(config: Mapping[str, Any], name: str) -> Any:
    if config.get(name) is None:
        raise ValueError(f"{name}: expected in the configuration of an assistant, got none")
    return config[name]


def _whole(name: str, value: Any, largest: int) -> int:
    if type(value) is not int or not 1 <= value <= largest:
        raise ValueError(f"{name}: expected a whole number from 1 to {largest}, got {str(value)[:40]}")
    return value


def _positive(name: str, value: Any, largest: float = 1e30) -> float:
    if type(value) not in (int, float) or not 0 < value <= largest:
        raise ValueError(f"{name}: expected a positive number up to {largest:g}, got {str(value)[:40]}")
    return float(value)


def _refuse_unknown(text: Mapping[str, Any]) -> None:
    """Settings that would change the result and that are not computed here."""
    known: dict[str, tuple[Any, ...]] = {
        "hidden_activation": ("gelu_pytorch_tanh", None),
        "attention_bias": (False, None),
        "enable_moe_block": (False, None),
        "hidden_size_per_layer_input": (0, None),
        "use_bidirectional_attention": ("vision", None),
    }
    for name, values in known.items():
        if text.get(name) not in values:
            raise ValueError(f"{name}: expected {values[0]!r} in a drafter, got {str(text[name])[:40]!r}")


def _sizes(text: Mapping[str, Any], layer: int, layer_type: str) -> tuple[Any, Any, Any]:
    """Query heads, key/value heads and head_dim of one layer, however the configuration says so."""
    heads, kv_heads, head_dim = (
        _need(text, name) for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    overrides = text.get("per_layer_config")
    if overrides is not None:  # transformers from 5.23 on; keys are strings in JSON
        if not isinstance(overrides, Mapping):
            raise ValueError(f"per_layer_config: expected an object, got {type(overrides).__name__}")
        own = overrides.get(str(layer), overrides.get(layer)) or {}
        if not isinstance(own, Mapping):
            raise ValueError(f"per_layer_config[{layer}]: expected an object, got {type(own).__name__}")
        return (
            own.get("num_attention_heads", heads), own.get("num_key_value_heads", kv_heads), own.get("head_dim", head_dim)
        )  # fmt: skip
    if layer_type == "full_attention":
        head_dim = text.get("global_head_dim") or _FULL_HEAD_DIM
        kv_heads = (text.get("attention_k_eq_v") and text.get("num_global_key_value_heads")) or kv_heads
    return heads, kv_heads, head_dim


def _geometry(
    text: Mapping[str, Any], layer_types: Any, sizes: list[tuple[Any, Any, Any]], layer_type: str
) -> AttentionGeometry:
    """Of one kind of layers. A drafter without any layer of the kind gets the sizes of its first layer."""
    present = layer_type if layer_type in layer_types else layer_types[0]
    found = {str(size): size for size, name in zip(sizes, layer_types, strict=True) if name == present}
    if len(found) != 1:
        raise ValueError(f"layer_types: expected one shape for all {present} layers, got {list(found)[:4]}")
    heads, kv_heads, head_dim = next(iter(found.values()))
    parameters = text.get("rope_parameters") or _ROPE
    rope = parameters.get(present) if isinstance(parameters, Mapping) else None
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_parameters: expected an object for {present}, got {str(rope)[:40]}")
    rope_type = rope.get("rope_type", "default")
    if rope_type not in ("default", "proportional") or rope.get("factor", 1.0) != 1.0:
        raise ValueError(f"rope_parameters[{present!r}]: expected default or proportional, got {str(dict(rope))[:120]}")
    fraction = rope.get("partial_rotary_factor", 1.0) if rope_type == "proportional" else 1.0
    return AttentionGeometry(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        window=_need(text, "sliding_window") if layer_type == "sliding_attention" else None,
        k_eq_v=layer_type == "full_attention" and bool(text.get("attention_k_eq_v")),
        rope_theta=_positive("rope_theta", rope.get("rope_theta", 1e4)),
        rope_fraction=_positive("partial_rotary_factor", fraction, 1.0),
    )
