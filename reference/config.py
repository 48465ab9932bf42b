"""What the reference needs to know about a model, as plain data.

`from_transformers` reads a transformers configuration by its attributes and imports nothing of it; what this reference
does not compute is refused by the name it has there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from gemma4_kernels.geometry import KIND_OF, LAYER_TYPE, AttentionGeometry, LayerKind, ModelGeometry


@dataclass(frozen=True)
class ImageConfig:
    """The image embedder. The 12B: patches of 48 x 48 x 3 values, width 3840, 1120 positions an axis."""

    patch_size: int
    """Side of a patch in pixels."""
    embed_dim: int
    num_positions: int
    eps: float = 1e-6


@dataclass(frozen=True)
class AudioConfig:
    """The audio embedder: frames of 640 samples."""

    frame_size: int
    eps: float = 1e-6


@dataclass(frozen=True)
class ReferenceConfig:
    """One model: its text layers, and its image and audio embedders if it is multimodal."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: tuple[LayerKind, ...]
    sliding: AttentionGeometry
    full: AttentionGeometry
    final_softcap: float | None = None
    eps: float = 1e-6
    num_kv_shared_layers: int = 0
    """Trailing layers without keys and values of their own: they read those of the last layer of their kind that has."""
    double_wide_mlp: bool = False
    """The layers that share keys and values have an MLP of twice the width."""
    image_blocks: bool = True
    """Tokens of one image see each other both ways ("use_bidirectional_attention": "vision")."""
    tied_head: bool = True
    pad_token_id: int = 0
    eos_token_ids: tuple[int, ...] = ()
    multimodal: bool = False
    """The text model lives under `model.language_model`, beside the embedders, and no longer under `model`."""
    image: ImageConfig | None = None
    audio: AudioConfig | None = None
    image_token_id: int = 258_880
    video_token_id: int = 258_884
    audio_token_id: int = 258_881

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("layers: expected at least one layer, got none")
        if not 0 <= self.num_kv_shared_layers <= len(self.layers):
            raise ValueError(
                f"num_kv_shared_layers: expected 0 to {len(self.layers)}, the number of layers, got"
                f" {self.num_kv_shared_layers}"
            )
        if self.sliding.window is None or self.sliding.window < 1:
            raise ValueError(f"sliding.window: expected a positive number of keys, got {self.sliding.window}")
        if self.sliding.k_eq_v:
            raise ValueError("sliding.k_eq_v: expected False, only full layers share keys and values")

    @property
    def window(self) -> int:
        """Keys that a token of a sliding layer sees, itself included."""
        assert self.sliding.window is not None  # __post_init__ checks it
        return self.sliding.window

    def attention(self, kind: LayerKind) -> AttentionGeometry:
        return self.sliding if kind == "sliding" else self.full

    def owns_kv(self, layer: int) -> bool:
        """Whether the layer computes its own keys and values."""
        return layer < len(self.layers) - self.num_kv_shared_layers

    @classmethod
    def from_geometry(cls, geometry: ModelGeometry, **overrides: Any) -> ReferenceConfig:
        """The text model of a family member; `overrides` are fields of this class.

        Raises: TypeError for an override that is no field.
        """
        config = cls(
            vocab_size=geometry.vocab_size,
            hidden_size=geometry.hidden_size,
            intermediate_size=geometry.intermediate_size,
            layers=geometry.layers,
            sliding=geometry.sliding,
            full=geometry.full,
            final_softcap=geometry.final_softcap,
            num_kv_shared_layers=geometry.num_kv_shared_layers,
        )
        return replace(config, **overrides)

    @classmethod
    def from_transformers(cls, config: Any) -> ReferenceConfig:
        """From a `Gemma4UnifiedTextConfig`, or from a `Gemma4UnifiedConfig` with its image and audio parts.

        Raises: ValueError naming a setting that the reference does not compute.
        """
        text = getattr(config, "text_config", None) or config
        _refuse_unknown(text)
        kinds = tuple(KIND_OF[layer_type] for layer_type in text.layer_types)
        multimodal = text is not config
        result = cls(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            layers=kinds,
            sliding=_attention(text, kinds, "sliding"),
            full=_attention(text, kinds, "full"),
            final_softcap=text.final_logit_softcapping,
            eps=text.rms_norm_eps,
            num_kv_shared_layers=text.num_kv_shared_layers,
            double_wide_mlp=text.use_double_wide_mlp,
            image_blocks=text.use_bidirectional_attention == "vision",
            tied_head=config.tie_word_embeddings,
            pad_token_id=text.pad_token_id or 0,
            eos_token_ids=_as_tuple(text.eos_token_id),
            multimodal=multimodal,
        )
        if not multimodal:
            return result
        vision, audio = config.vision_config, config.audio_config
        image = None
        if vision is not None:
            image = ImageConfig(
                vision.model_patch_size, vision.mm_embed_dim, vision.mm_posemb_size, vision.rms_norm_eps
            )
        return replace(
            result,
            image=image,
            audio=None if audio is None else AudioConfig(audio.audio_embed_dim, audio.rms_norm_eps),
            image_token_id=config.image_token_id,
            video_token_id=config.video_token_id,
            audio_token_id=config.audio_token_id,
        )


@dataclass(frozen=True)
class DrafterConfig:
    """The MTP drafter: four text layers without keys and values, between two projections to the target's width."""

    text: ReferenceConfig
    target_hidden_size: int
    num_centroids: int | None = None
    """Clusters of the vocabulary that the head chooses among first; None: a dense head."""
    centroid_top_k: int = 32

    @classmethod
    def from_transformers(cls, config: Any) -> DrafterConfig:
        """From a `Gemma4UnifiedAssistantConfig`."""
        text = ReferenceConfig.from_transformers(config.text_config)
        return cls(
            # The head is tied by the outer configuration, and the drafter's logits have no softcap.
            text=replace(text, tied_head=config.tie_word_embeddings, final_softcap=None),
            target_hidden_size=config.backbone_hidden_size,
            num_centroids=config.num_centroids if config.use_ordered_embeddings else None,
            centroid_top_k=config.centroid_intermediate_top_k,
        )


def _refuse_unknown(text: Any) -> None:
    """Raise for every setting that would change the result and that the reference does not know."""
    refused: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "use_bidirectional_attention": (text.use_bidirectional_attention, (None, "vision")),
        "hidden_activation": (text.hidden_activation, ("gelu_pytorch_tanh",)),
        "attention_bias": (text.attention_bias, (False,)),
        "enable_moe_block": (getattr(text, "enable_moe_block", False), (False,)),
        "hidden_size_per_layer_input": (getattr(text, "hidden_size_per_layer_input", 0), (0, None)),
    }
    for layer_type in set(text.layer_types):
        if layer_type not in KIND_OF:
            raise ValueError(f"layer_types: expected {sorted(KIND_OF)}, got {layer_type!r}")
        rope = text.rope_parameters[layer_type]
        name = f"rope_parameters[{layer_type!r}]"
        refused[f"{name}['rope_type']"] = (rope["rope_type"], ("default", "proportional"))
        refused[f"{name}['factor']"] = (rope.get("factor", 1.0), (1.0,))
    for name, (value, known) in refused.items():
        if value not in known:
            raise ValueError(f"{name}: expected one of {known}, the reference does not compute {value!r}")


def _attention(text: Any, kinds: tuple[LayerKind, ...], kind: LayerKind) -> AttentionGeometry:
    """The geometry of one kind of layer. A model without any layer of the kind gets the other kind's sizes."""
    present = kind if kind in kinds else kinds[0]
    layers = [text.per_layer_config[layer] for layer in range(len(kinds)) if kinds[layer] == present]
    sizes = {(layer.num_attention_heads, layer.num_key_value_heads, layer.head_dim) for layer in layers}
    if len(sizes) != 1:
        raise ValueError(f"per_layer_config: expected one shape for all {LAYER_TYPE[present]} layers, got {sizes}")
    num_heads, num_kv_heads, head_dim = sizes.pop()
    rope = text.rope_parameters[LAYER_TYPE[present]]
    proportional = rope["rope_type"] == "proportional"
    return AttentionGeometry(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        window=text.sliding_window if kind == "sliding" else None,
        k_eq_v=kind == "full" and text.attention_k_eq_v,
        rope_theta=rope["rope_theta"],
        rope_fraction=rope.get("partial_rotary_factor", 1.0) if proportional else 1.0,
    )


def _as_tuple(token_ids: int | Iterable[int] | None) -> tuple[int, ...]:
    if token_ids is None:
        return ()
    return (token_ids,) if isinstance(token_ids, int) else tuple(token_ids)
