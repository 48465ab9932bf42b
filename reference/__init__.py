"""The oracle: slow, obvious PyTorch that a reader can hold against the description of Gemma 4.

Whole score matrices, loops where they are clearer, any dtype, float64 on request. It imports torch and the geometry of
the family, nothing else of this package and no other library.

    attention              attention, flash_attention, plain_attention
    K equals V             keys_from_values, k_eq_v_attention, k_eq_v_from_values_alone, plain_k_eq_v_attention
    masks                  visible, layer_visible, block_ids_from_token_types
    small parts            RMSNorm, rms_norm, default_inv_freq, proportional_inv_freq, rotation, apply_rope, softcap
    the model              ReferenceConfig, ReferenceModel, ReferenceOutput, ReferenceCache
    its drafter            DrafterConfig, ReferenceDrafter, DrafterOutput, Draft
    verification           SamplingFilters, GREEDY, RECOMMENDED, filter_logits, gumbel_noise, sample_tokens,
                           verify_drafts, Verification
    with keyed noise       KeyedNoise, Sampler, draft_by_sampling, verify_request
    generation             generate, speculative_generate, drafts_of, DraftContext, SpeculativeResult, ReferenceTarget
"""

from gemma4_kernels.reference.attention import attention, flash_attention, plain_attention
from gemma4_kernels.reference.cache import ReferenceCache
from gemma4_kernels.reference.config import AudioConfig, DrafterConfig, ImageConfig, ReferenceConfig
from gemma4_kernels.reference.drafter import Draft, DrafterOutput, ReferenceDrafter
from gemma4_kernels.reference.k_eq_v import (
    k_eq_v_attention,
    k_eq_v_from_values_alone,
    keys_from_values,
    plain_k_eq_v_attention,
)
from gemma4_kernels.reference.layers import (
    RMSNorm,
    apply_rope,
    default_inv_freq,
    proportional_inv_freq,
    rms_norm,
    rotation,
    softcap,
)
from gemma4_kernels.reference.masks import block_ids_from_token_types, layer_visible, visible
from gemma4_kernels.reference.model import ReferenceModel, ReferenceOutput
from gemma4_kernels.reference.noise import KeyedNoise
from gemma4_kernels.reference.sampled_drafts import Sampler, draft_by_sampling, verify_request
from gemma4_kernels.reference.speculative import (
    DraftContext,
    SpeculativeResult,
    drafts_of,
    generate,
    speculative_generate,
)
from gemma4_kernels.reference.target import ReferenceTarget
from gemma4_kernels.reference.verification import (
    GREEDY,
    RECOMMENDED,
    SamplingFilters,
    Verification,
    filter_logits,
    gumbel_noise,
    sample_tokens,
    verify_drafts,
)

__all__ = [
    "GREEDY",
    "RECOMMENDED",
    "AudioConfig",
    "Draft",
    "DraftContext",
    "DrafterConfig",
    "DrafterOutput",
    "ImageConfig",
    "KeyedNoise",
    "RMSNorm",
    "ReferenceCache",
    "ReferenceConfig",
    "ReferenceDrafter",
    "ReferenceModel",
    "ReferenceOutput",
    "ReferenceTarget",
    "Sampler",
    "SamplingFilters",
    "SpeculativeResult",
    "Verification",
    "apply_rope",
    "attention",
    "block_ids_from_token_types",
    "default_inv_freq",
    "draft_by_sampling",
    "drafts_of",
    "filter_logits",
    "flash_attention",
    "generate",
    "gumbel_noise",
    "k_eq_v_attention",
    "k_eq_v_from_values_alone",
    "keys_from_values",
    "layer_visible",
    "plain_attention",
    "plain_k_eq_v_attention",
    "proportional_inv_freq",
    "rms_norm",
    "rotation",
    "sample_tokens",
    "softcap",
    "speculative_generate",
    "verify_drafts",
    "verify_request",
    "visible",
]
