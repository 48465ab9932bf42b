"""`gemma4-kernels generate`: text from a model and its drafter, with what the drafts have brought."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "generate",
        help="write text with speculative decoding",
        description="Continue prompts with a Gemma 4 model of transformers, its drafter, and verified drafts. The text is "
        "that of decoding without drafts.",
    )
    parser.add_argument("model", help="folder (or name) of the model, as transformers takes it")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="texts to continue; none: read one from stdin")
    parser.add_argument("--drafter", help="folder of the model's assistant; without it, plain decoding")
    parser.add_argument(
        "--weights", help="GGUF or safetensors file, or folder, of quantised weights for the model's layers"
    )
    parser.add_argument("--chat", action="store_true", help="put each prompt into the tokenizer's chat template")
    parser.add_argument("-n", "--max-new-tokens", type=int, default=256)
    parser.add_argument(
        "-k", "--num-drafts", type=int, help="the most drafts of a round (default: the assistant's, or 4)"
    )
    parser.add_argument("--fixed", action="store_true", help="always that many drafts, whatever was accepted")
    parser.add_argument("--method", choices=("match", "rejection", "block"), default="match")
    parser.add_argument(
        "-t", "--temperature", type=float, default=0.0, help="0, the default, is greedy; Gemma recommends 1"
    )
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--seed", type=int, help="of the first prompt; the next one has the next")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="STRING", help="end a text with this; repeatable"
    )
    parser.add_argument(
        "--max-rows",
        type=int,
        help="the most rows of a pass over drafts; with 16 and quantised layers a text keeps its bits in any batch",
    )
    parser.add_argument("--device", help="default: cuda if there is one, then mps, then cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    prompts = arguments.prompts or [sys.stdin.read()]
    try:
        import torch
        import transformers
    except ImportError as error:
        print(f"gemma4-kernels generate: needs transformers, which cannot be imported: {error}", file=sys.stderr)
        return 2
    from gemma4_kernels import mtp, open_weights, replace_linear
    from gemma4_kernels.bench import machine
    from gemma4_kernels.integrations.transformers_target import TransformersTarget

    dtype = getattr(torch, arguments.dtype)
    transformers.utils.logging.disable_progress_bar()
    try:
        device = machine.known_device(arguments.device) if arguments.device else machine.default_device()
        tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
        model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).to(device).eval()
        if arguments.weights:
            replace_linear(model, open_weights(arguments.weights))
        drafter = None
        if arguments.drafter:
            drafter = mtp.Drafter.from_folder(Path(arguments.drafter), dtype=dtype, device=device)
        printer = _Printer(tokenizer, len(prompts))
        generation = mtp.generate(
            TransformersTarget(model, max_rows=arguments.max_rows),
            drafter,
            [_tokens(tokenizer, prompt, arguments.chat) for prompt in prompts],
            max_new_tokens=arguments.max_new_tokens, num_drafts=arguments.num_drafts, adaptive=not arguments.fixed,
            temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p, min_p=arguments.min_p,
            seeds=arguments.seed, method=arguments.method, stop_strings=arguments.stop, tokenizer=tokenizer,
            on_tokens=printer,
        )  # fmt: skip
    except (ValueError, TypeError, OSError) as error:
        print(f"gemma4-kernels generate: {error}", file=sys.stderr)
        return 2
    printer.finish()
    print(generation.statistics, file=sys.stderr)
    return 0


class _Printer:
    """One text as it comes; several, each when it is whole. The acceptance so far stands on stderr, if that is a terminal."""

    def __init__(self, tokenizer: Any, count: int) -> None:
        self.tokenizer, self.count = tokenizer, count
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.printed = ""
        self.live = sys.stderr.isatty()

    def __call__(self, update: Any) -> None:
        tokens = self.tokens[update.request]
        tokens += update.tokens
        if self.count == 1:
            text = self._decoded(tokens)
            # The last character may be half of one that the next token completes.
            ready = text if update.finish_reason else text.rstrip("\ufffd")
            self._clear()
            # And a tokenizer may take back what it made of bytes until they are a whole character.
            if len(ready) > len(self.printed):
                print(ready[len(self.printed) :], end="", flush=True)
                self.printed = ready
        elif update.finish_reason:
            self._clear()
            print(f"[{update.request}] {self._decoded(tokens)}\n", flush=True)
        if self.live:
            statistics = update.statistics
            shown = f"{statistics.tokens} tokens"
            if statistics.target_passes:
                shown += f", {statistics.tokens_per_pass:.2f} a pass"
            if sum(statistics.offered):
                shown += f", {statistics.acceptance:.0%} of the drafts accepted"
            self._status(shown)

    def _decoded(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _clear(self) -> None:
        if self.live:
            self._status("")

    def _status(self, text: str) -> None:
        """Write on the line below the text. Down and up again first: at the bottom of the screen that makes room, and only then
        does a saved place stay where it was."""
        width = shutil.get_terminal_size().columns - 1
        print(f"\x1bD\x1b[A\x1b7\x1b[B\r\x1b[2K{text[:width]}\x1b8", end="", file=sys.stderr, flush=True)

    def finish(self) -> None:
        self._clear()
        print(flush=True)


def _tokens(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    if chat:
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(prompt)["input_ids"])
