"""Images and audio without an encoder: raw patches and raw samples, normed and projected into the text model's width.

Names of parameters are those of transformers' `Gemma4UnifiedModel`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gemma4_kernels.reference.config import AudioConfig, ImageConfig, ReferenceConfig
from gemma4_kernels.reference.decoder import TextModel
from gemma4_kernels.reference.layers import RMSNorm


class MultimodalProjection(nn.Module):
    """RMSNorm without a weight, then a linear map: all there is for audio, the last step for images."""

    def __init__(self, dim: int, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.embedding_pre_projection_norm = RMSNorm(dim, eps, with_scale=False)
        self.embedding_projection = nn.Linear(dim, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., hidden), computed in the weight's dtype."""
        normed = self.embedding_pre_projection_norm(x.to(self.embedding_projection.weight.dtype))
        projected: Tensor = self.embedding_projection(normed)
        return projected


class ImageEmbedder(nn.Module):
    """Patch -> LayerNorm -> Linear -> LayerNorm -> + position -> LayerNorm -> `MultimodalProjection`.

    The position of a patch is the sum of one row for its x and one for its y, from a table of (positions, 2 axes, dim).
    """

    def __init__(self, config: ImageConfig, hidden_size: int) -> None:
        super().__init__()
        self.patch_values = config.patch_size**2 * 3
        self.patch_ln1 = nn.LayerNorm(self.patch_values)
        self.patch_dense = nn.Linear(self.patch_values, config.embed_dim)
        self.patch_ln2 = nn.LayerNorm(config.embed_dim)
        self.pos_embedding = nn.Parameter(torch.zeros(config.num_positions, 2, config.embed_dim))
        self.pos_norm = nn.LayerNorm(config.embed_dim)
        self.multimodal_embedder = MultimodalProjection(config.embed_dim, hidden_size, config.eps)

    def forward(self, pixel_values: Tensor, position_ids: Tensor) -> Tensor:
        """Embed every patch, those of padding too.

        Args:
            pixel_values: (images, patches, 3 * side^2).
            position_ids: (images, patches, 2) integers (x, y); -1 adds nothing, and (-1, -1) is padding.
        Returns: (images, patches, hidden).
        """
        patches = self.patch_ln2(self.patch_dense(self.patch_ln1(pixel_values.to(self.patch_dense.weight.dtype))))
        x_rows, y_rows = (
            self.pos_embedding[position_ids[..., axis].long().clamp(min=0), axis]  # (images, patches, dim)
            * (position_ids[..., axis] != -1)[..., None]
            for axis in range(2)
        )
        embedded: Tensor = self.multimodal_embedder(self.pos_norm(patches + (x_rows + y_rows)))
        return embedded

    def soft_tokens(self, pixel_values: Tensor, position_ids: Tensor) -> Tensor:
        """The embedded patches without the padding, all images in a row: (tokens, hidden)."""
        return self.forward(pixel_values, position_ids)[(position_ids != -1).all(dim=-1)]


class AudioEmbedder(MultimodalProjection):
    """One soft token a frame of raw samples; no position embedding, no encoder."""

    def __init__(self, config: AudioConfig, hidden_size: int) -> None:
        super().__init__(config.frame_size, hidden_size, config.eps)

    def soft_tokens(self, frames: Tensor, frame_mask: Tensor) -> Tensor:
        """The embedded frames (clips, frames, samples) where the mask is True, in a row: (tokens, hidden)."""
        return self.forward(frames)[frame_mask.bool()]


class MultimodalModel(nn.Module):
    """The text model beside its embedders, whose soft tokens replace the embeddings of placeholder tokens."""

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        self.config = config
        self.language_model = TextModel(config)
        self.embed_vision = ImageEmbedder(config.image, config.hidden_size) if config.image else None
        self.embed_audio = AudioEmbedder(config.audio, config.hidden_size) if config.audio else None

    def soft_tokens(self, features: dict[str, Tensor | None]) -> list[tuple[str, int, Tensor]]:
        """What the embedders make of the inputs, by the names that `ReferenceModel.forward` has for them.

        Returns: for each input present its name, its placeholder token, its soft tokens (tokens, hidden).
        Raises: ValueError naming the argument.
        """
        found: list[tuple[str, int, Tensor]] = []
        for name, positions_name, token_id in (
            ("pixel_values", "image_position_ids", self.config.image_token_id),
            ("pixel_values_videos", "video_position_ids", self.config.video_token_id),
        ):
            patches, positions = features[name], features[positions_name]
            if patches is None:
                continue
            if self.embed_vision is None:
                raise ValueError(f"{name}: expected None, this model has no image embedder")
            num_values = self.embed_vision.patch_values
            if patches.ndim != 3 or patches.shape[2] != num_values:
                raise ValueError(f"{name}: expected (n, patches, {num_values}), got {tuple(patches.shape)}")
            if positions is None or positions.shape != (*patches.shape[:2], 2):
                got = None if positions is None else tuple(positions.shape)
                raise ValueError(f"{positions_name}: expected {(*patches.shape[:2], 2)} to go with {name}, got {got}")
            if name == "pixel_values_videos":
                frames = features["num_frames_per_video"]
                if frames is None or int(frames.sum()) != patches.shape[0]:
                    raise ValueError(f"num_frames_per_video: expected a sum of {patches.shape[0]} frames, got {frames}")
            found.append((name, token_id, self.embed_vision.soft_tokens(patches, positions)))

        clips, clip_mask = features["input_features"], features["input_features_mask"]
        if clips is not None:
            if self.embed_audio is None:
                raise ValueError("input_features: expected None, this model has no audio embedder")
            frame_size = self.embed_audio.embedding_projection.in_features
            if clips.ndim != 3 or clips.shape[2] != frame_size:
                raise ValueError(f"input_features: expected (clips, frames, {frame_size}), got {tuple(clips.shape)}")
            if clip_mask is None or clip_mask.shape != clips.shape[:2]:
                got = None if clip_mask is None else tuple(clip_mask.shape)
                raise ValueError(f"input_features_mask: expected {tuple(clips.shape[:2])}, got {got}")
            found.append(("input_features", self.config.audio_token_id, self.embed_audio.soft_tokens(clips, clip_mask)))
        return found
