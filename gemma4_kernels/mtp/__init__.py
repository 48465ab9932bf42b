"""Multi-token prediction: the drafter, and speculative generation for a batch that never changes the text.

    from gemma4_kernels import mtp
    generation = mtp.generate(model, drafter, input_ids)

See docs/mtp.md.
"""

from gemma4_kernels.mtp.cache import CachedLayer, SpeculativeCache
from gemma4_kernels.mtp.draft_length import AdaptiveLength
from gemma4_kernels.mtp.drafter import Drafter, DrafterConfig, Drafts, DraftSampling
from gemma4_kernels.mtp.drafting import DraftContext, DraftFunction
from gemma4_kernels.mtp.generation import Generation, Update, generate
from gemma4_kernels.mtp.rows import LayerRows, SharedRows
from gemma4_kernels.mtp.statistics import Statistics
from gemma4_kernels.mtp.target import Pass, Target

__all__ = [
    "AdaptiveLength",
    "CachedLayer",
    "DraftContext",
    "DraftFunction",
    "DraftSampling",
    "Drafter",
    "DrafterConfig",
    "Drafts",
    "Generation",
    "LayerRows",
    "Pass",
    "SharedRows",
    "SpeculativeCache",
    "Statistics",
    "Target",
    "Update",
    "generate",
]
