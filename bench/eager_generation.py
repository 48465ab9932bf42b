"""Speculative generation end to end on this CPU: passes of the target for a token, and where the time goes.

    python -m gemma4_kernels.bench.eager_generation [--tokens N]

Target and drafter have random weights and the 12B's kinds of layers in small. A drafter that has not been trained guesses
nothing right, so drafts come from three sources: the drafter; one that knows the text and errs at random; nobody. The drafter's
steps are timed in the first case, what acceptance brings in the second.
"""

from __future__ import annotations

import argparse
import time
from typing import TypeVar

import torch
from torch import Tensor

from gemma4_kernels import mtp, use_backend
from gemma4_kernels.geometry import AttentionGeometry

VOCAB, HIDDEN, WINDOW, PROMPT = 8192, 256, 128, 200
SLIDING = AttentionGeometry(4, 2, 128, WINDOW, False, 1e4, 1.0)
FULL = AttentionGeometry(4, 1, 256, None, True, 1e6, 0.25)
ACCEPTANCE = 0.8
Model = TypeVar("Model", bound=torch.nn.Module)


def main() -> None:
    parser = argparse.ArgumentParser(description="Speculative generation with small random models on this CPU.")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of a request (default 32)")
    new = parser.parse_args().tokens
    try:
        target = _target()
    except ImportError as error:
        print(f"needs transformers: {error}")
        return
    drafter = _drafter()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, prompts of {PROMPT} tokens")
    with use_backend("eager"):
        for batch in (1, 4):
            prompts = torch.randint(1, VOCAB, (batch, PROMPT), generator=torch.Generator().manual_seed(batch))
            plain, plain_seconds = _timed(target, None, prompts, new, 0)
            print(f"\n{batch} requests, plain decoding\n  {plain.statistics}")
            texts = [[*prompt, *tokens] for prompt, tokens in zip(prompts.tolist(), plain.tokens, strict=True)]
            for name, source in (
                ("the drafter", drafter),
                (f"{ACCEPTANCE:.0%} right by construction", _teller(texts)),
            ):
                got, seconds = _timed(target, source, prompts, new, 4)
                same = "same text" if got.tokens == plain.tokens else "ANOTHER TEXT"
                print(f"4 drafts, {name}: {plain_seconds / seconds:.2f}x as fast as plain, {same}\n  {got.statistics}")


def _timed(target: object, source: object, prompts: Tensor, new: int, drafts: int) -> tuple[mtp.Generation, float]:
    start = time.perf_counter()
    made = mtp.generate(target, source, prompts, max_new_tokens=new, num_drafts=drafts, adaptive=False)
    return made, time.perf_counter() - start


def _target() -> object:
    from transformers import Gemma4UnifiedForCausalLM, Gemma4UnifiedTextConfig

    config = Gemma4UnifiedTextConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=4 * HIDDEN, num_hidden_layers=6,
        num_attention_heads=SLIDING.num_heads, num_key_value_heads=SLIDING.num_kv_heads, head_dim=SLIDING.head_dim,
        global_head_dim=FULL.head_dim, num_global_key_value_heads=FULL.num_kv_heads, attention_k_eq_v=True,
        sliding_window=WINDOW, final_logit_softcapping=30.0, eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    return _random(Gemma4UnifiedForCausalLM(config))


def _drafter() -> mtp.Drafter:
    kinds = ("sliding", "sliding", "sliding", "full")
    config = mtp.DrafterConfig(VOCAB, HIDDEN // 4, 2 * HIDDEN, HIDDEN, kinds, SLIDING, FULL)  # type: ignore[arg-type]
    return _random(mtp.Drafter(config))


def _random(model: Model) -> Model:
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=rng)
    return model.eval().requires_grad_(False)


def _teller(texts: list[list[int]]) -> mtp.DraftFunction:
    rng = torch.Generator().manual_seed(1)

    def draft(context: mtp.DraftContext) -> Tensor:
        count = context.num_drafts
        rows = [
            torch.tensor((texts[request] + [0] * count)[len(text) : len(text) + count])
            for request, text in zip(context.requests, context.texts, strict=True)
        ]
        right = torch.stack(rows)  # (A, K)
        errs = torch.rand(right.shape, generator=rng) >= ACCEPTANCE
        return torch.where(errs, (right + 1) % VOCAB, right)

    return draft


if __name__ == "__main__":
    main()
