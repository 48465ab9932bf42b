"""One decode step of a Gemma 4 from this package's functions alone: how a runtime calls them, and what a token must cost.

    python examples/decode_step.py [--context 4096] [--drafts 4] [--batch 1] [--layers 48] [--card "rtx 3060"]

The weights are random, the shapes those of the 12B. Nothing in a step waits for the device or allocates by the data, so all
of it goes into one CUDA graph, and one replay is one step: a token for each request, or, with --drafts, the verification of
so many drafts.

First the step is held against the reference on a small model: its logits by the error rule that all kernels are held to, and
the rows of a verification bit for bit against the same rows one by one. Then the large step runs, on the backend that is
there. Printed: bytes, launches, and the time beside the time in which the card's memory could deliver those bytes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gemma4_kernels import (
    GEMMA4_12B,
    QuantizedWeight,
    RingCache,
    backends,
    flash_attn_with_kvcache,
    k_eq_v_attention,
    k_eq_v_norm_rope_append,
    qkv_norm_rope_append,
    quantized_embedding,
    quantized_geglu,
    quantized_linear,
    sandwich_norm,
    verify_drafts,
)
from gemma4_kernels.bench import cards, machine
from gemma4_kernels.bench.errors import judge
from gemma4_kernels.bench.linear_inputs import random_weight
from gemma4_kernels.cuda_common import support as cuda_support
from gemma4_kernels.geometry import AttentionGeometry, LayerKind, ModelGeometry
from gemma4_kernels.op_support import DECODE_ROWS
from gemma4_kernels.reference import ReferenceConfig, ReferenceModel, proportional_inv_freq

LAYER_SCHEME, HEAD_SCHEME = "Q4_0", "Q6_K"  # as in the GGUF files that people have
EPS = 1e-6
SMALL = replace(
    GEMMA4_12B, name="a small Gemma", hidden_size=256, intermediate_size=512, num_layers=6, vocab_size=1000,
    sliding=replace(GEMMA4_12B.sliding, num_heads=4, num_kv_heads=2, head_dim=64, window=24),
    full=replace(GEMMA4_12B.full, num_heads=4),
)  # fmt: skip


# The step -----------------------------------------------------------------------------------------------------------


@dataclass
class Layer:
    """The weights of a layer and what it remembers. Linear weights are N x K as in their file."""

    kind: LayerKind
    attention: AttentionGeometry
    qkv: QuantizedWeight
    """q, k and v one after the other; without v where it is k."""
    output: QuantizedWeight
    gate: QuantizedWeight
    up: QuantizedWeight
    down: QuantizedWeight
    norms: dict[str, Tensor]
    """input, post_attention, pre_feedforward, post_feedforward (hidden,); q and k (D,)."""
    scalar: Tensor
    cache: tuple[Tensor, ...]
    """Pages of keys and values, or of values alone: (num_pages, page_size, Hkv, D)."""
    block_table: Tensor
    """(B, pages of a request) int32."""


class DecodeStep:
    """B requests, each with R rows: the last token of its text, and its drafts."""

    def __init__(
        self, geometry: ModelGeometry, *, batch: int, drafts: int, context: int, device: torch.device,
        dtype: torch.dtype = torch.bfloat16, num_layers: int | None = None,
    ) -> None:  # fmt: skip
        self.geometry, self.device, self.dtype = geometry, device, dtype
        self.batch, self.rows = batch, drafts + 1
        kinds = geometry.layers[:num_layers]
        self.head = random_weight(HEAD_SCHEME, (geometry.vocab_size, geometry.hidden_size), seed=1).to(device)
        self.layers = [self._layer(kind, context, seed=100 * (index + 1)) for index, kind in enumerate(kinds)]
        self.final_norm = self._norm(geometry.hidden_size, seed=3)
        self.inv_freq = {
            kind: proportional_inv_freq(each.head_dim, each.rope_theta, each.rope_fraction).to(device)
            for kind, each in (("sliding", geometry.sliding), ("full", geometry.full))
        }
        # What a step reads and leaves for the next one, in place: a graph knows tensors by their addresses.
        self.tokens = torch.zeros((batch, self.rows), dtype=torch.int64, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.logits = torch.zeros((batch, self.rows, geometry.vocab_size), dtype=dtype, device=device)
        self.verified = torch.zeros((batch, self.rows), dtype=torch.int64, device=device)

    def _norm(self, size: int, seed: int) -> Tensor:
        noise = torch.randn(size, generator=torch.Generator().manual_seed(seed))
        return (1 + 0.1 * noise).to(self.device, self.dtype)

    def _layer(self, kind: LayerKind, context: int, seed: int) -> Layer:
        geometry, attention = self.geometry, self.geometry.attention(kind)
        hidden, wide = geometry.hidden_size, geometry.intermediate_size
        q_size, kv_size = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
        merged = q_size + kv_size * (1 if attention.k_eq_v else 2)
        shapes = {
            "qkv": (merged, hidden), "output": (hidden, q_size), "gate": (wide, hidden), "up": (wide, hidden),
            "down": (hidden, wide),
        }  # fmt: skip
        weights = {
            name: random_weight(LAYER_SCHEME, shape, seed=seed + place).to(self.device)
            for place, (name, shape) in enumerate(shapes.items())
        }
        names = ("input", "post_attention", "pre_feedforward", "post_feedforward")
        norms = {name: self._norm(hidden, seed + 10 + place) for place, name in enumerate(names)}
        norms["q"] = self._norm(attention.head_dim, seed + 20)
        norms["k"] = 0.12 * self._norm(attention.head_dim, seed + 21)
        positions = context + 2 * DECODE_ROWS
        if attention.window is not None:
            ring = RingCache.allocate(
                self.batch, attention.window, attention.num_kv_heads, attention.head_dim, dtype=self.dtype,
                device=self.device,
            )  # fmt: skip
            cache, table = ring.pages(), ring.block_table(positions)
        else:
            page_size = 64
            per_request = -(-positions // page_size)
            shape = (self.batch * per_request, page_size, attention.num_kv_heads, attention.head_dim)
            cache = (torch.zeros(shape, dtype=self.dtype, device=self.device),)
            table = torch.arange(self.batch * per_request, dtype=torch.int32, device=self.device).view(self.batch, -1)
        scalar = torch.full((1,), 0.9, dtype=self.dtype, device=self.device)
        return Layer(kind, attention, **weights, norms=norms, scalar=scalar, cache=cache, block_table=table)

    @property
    def weight_bytes(self) -> int:
        """Of a step: every weight once, rows of the embedding not counted."""
        linear = sum(
            weight.nbytes
            for each in self.layers
            for weight in (each.qkv, each.output, each.gate, each.up, each.down)
        )  # fmt: skip
        return linear + self.head.nbytes

    def cache_bytes(self, length: int) -> int:
        """Keys and values that the rows of a step see, each once."""
        rows = [min(length, each.attention.window or length) for each in self.layers]
        sizes = [
            len(e.cache) * e.attention.num_kv_heads * e.attention.head_dim * self.dtype.itemsize for e in self.layers
        ]
        return self.batch * sum(a * b for a, b in zip(rows, sizes, strict=True))

    def run(self) -> None:
        """One step: `logits` and `verified` of the rows `tokens`, whose keys and values are written behind `lengths`."""
        hidden = quantized_embedding(self.tokens, self.head, dtype=self.dtype)  # (B, R, hidden)
        hidden = hidden * self.embedding_scale
        normed = torch.nn.functional.rms_norm(
            hidden, hidden.shape[-1:], self.layers[0].norms["input"], EPS
        )  # fmt: skip
        positions = self.lengths[:, None] + torch.arange(self.rows, device=self.device)  # (B, R)
        rotations = {kind: self._rotation(positions, inv_freq) for kind, inv_freq in self.inv_freq.items()}
        attended = self.lengths + self.rows
        followers = [*(layer.norms["input"] for layer in self.layers[1:]), self.final_norm]
        for layer, following in zip(self.layers, followers, strict=True):
            mixed = self._attend(layer, normed, rotations[layer.kind], attended)
            hidden, normed = sandwich_norm(
                mixed, hidden, layer.norms["post_attention"], layer.norms["pre_feedforward"], eps=EPS
            )
            forward = quantized_linear(quantized_geglu(normed, layer.gate, layer.up), layer.down)
            hidden, normed = sandwich_norm(
                forward, hidden, layer.norms["post_feedforward"], following, layer_scalar=layer.scalar, eps=EPS
            )
        self.logits.copy_(quantized_linear(normed, self.head))
        found = verify_drafts(
            self.logits, self.tokens[:, 1:], temperature=0.0, softcap=self.geometry.final_softcap or 0.0
        )
        self.verified.copy_(found.tokens)

    @property
    def embedding_scale(self) -> float:
        """sqrt(hidden), rounded to the dtype of the weights as in transformers."""
        return float(torch.tensor(self.geometry.hidden_size**0.5, dtype=self.dtype))

    def _rotation(self, positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (B, R, D)."""
        angle = positions[..., None].float() * inv_freq
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos().to(self.dtype), angle.sin().to(self.dtype)

    def _attend(self, layer: Layer, normed: Tensor, rotation: tuple[Tensor, Tensor], attended: Tensor) -> Tensor:
        attention, norms = layer.attention, layer.norms
        heads = quantized_linear(normed, layer.qkv).unflatten(-1, (-1, attention.head_dim))  # (B, R, Hq + ..., D)
        q, k, *v = heads.split(
            [attention.num_heads] + [attention.num_kv_heads] * (1 if attention.k_eq_v else 2), dim=2
        )  # fmt: skip
        places: dict[str, Any] = {"cache_seqlens": self.lengths, "block_table": layer.block_table, "eps": EPS}
        if attention.k_eq_v:
            (values,) = layer.cache
            q = k_eq_v_norm_rope_append(q, k, norms["q"], *rotation, values, **places)
            out = k_eq_v_attention(
                q, values, norms["k"], self.inv_freq[layer.kind], cache_seqlens=attended, block_table=layer.block_table
            )
        else:
            q = qkv_norm_rope_append(q, k, *v, norms["q"], norms["k"], *rotation, *layer.cache, **places)
            out = flash_attn_with_kvcache(
                q, *layer.cache, cache_seqlens=attended, block_table=layer.block_table, softmax_scale=1.0, causal=True,
                window_size=attention.window_size,
            )  # fmt: skip
        assert isinstance(out, Tensor)  # without return_lse
        return quantized_linear(out.flatten(2), layer.output)


# Against the reference ----------------------------------------------------------------------------------------------


def reference_of(step: DecodeStep, dtype: torch.dtype) -> ReferenceModel:
    """The same model in the reference, its weights written out."""
    config = ReferenceConfig.from_geometry(step.geometry, layers=tuple(layer.kind for layer in step.layers), eps=EPS)
    model = ReferenceModel(config).to(dtype)
    text = model.text
    with torch.no_grad():
        text.embed_tokens.weight.copy_(step.head.dequantize())
        text.norm.weight.copy_(step.final_norm)
        for layer, own in zip(text.layers, step.layers, strict=True):
            attention = layer.self_attn
            sizes = [own.attention.num_heads] + [own.attention.num_kv_heads] * (1 if own.attention.k_eq_v else 2)
            parts = own.qkv.dequantize().split([size * own.attention.head_dim for size in sizes])
            projections = [attention.q_proj, attention.k_proj, *([attention.v_proj] if len(parts) == 3 else [])]
            for projection, part in zip(projections, parts, strict=True):
                projection.weight.copy_(part)
            for module, weight in (
                (attention.o_proj, own.output), (layer.mlp.gate_proj, own.gate), (layer.mlp.up_proj, own.up),
                (layer.mlp.down_proj, own.down),
            ):  # fmt: skip
                module.weight.copy_(weight.dequantize())
            for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
                getattr(layer, f"{name}_layernorm").weight.copy_(own.norms[name])
            attention.q_norm.weight.copy_(own.norms["q"])
            attention.k_norm.weight.copy_(own.norms["k"])
            layer.layer_scalar.copy_(own.scalar)
    return model


@torch.no_grad()
def check(device: torch.device, tokens: int = 40, rows: int = 5) -> str:
    """A text fed to a small model, token by token and a few rows at a time, against the reference. Raises AssertionError."""
    text = torch.randint(0, SMALL.vocab_size, (2, tokens), generator=torch.Generator().manual_seed(5)).to(device)
    logits = {}
    for count in (1, rows):
        step = DecodeStep(SMALL, batch=2, drafts=count - 1, context=tokens, device=device)
        parts = []
        for start in range(0, tokens, count):
            step.tokens.copy_(text[:, start : start + count])
            step.run()
            step.lengths += count
            parts.append(step.logits.clone())
        logits[count] = torch.cat(parts, dim=1).cpu()  # (B, tokens, V)
    assert torch.equal(logits[1], logits[rows]), "rows have other bits together than alone"
    step = DecodeStep(SMALL, batch=2, drafts=0, context=tokens, device=torch.device("cpu"))
    # Without the softcap, which verify_drafts applies: of raw logits.
    exact, plain = (
        model.lm_head(model(text.cpu()).hidden)
        for model in (reference_of(step, torch.float64), reference_of(step, torch.bfloat16))
    )
    verdict = judge(logits[1], exact, plain)
    assert verdict.ok, str(verdict)
    return str(verdict)


# What a step costs --------------------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Counts what is called: this package's ops, and PyTorch's own that compute something."""

    VIEWS = ("view", "unsqueeze", "expand", "slice", "split", "select", "detach", "alias", "empty", "t", "transpose")

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = function.name().split("::")
        if namespace == "gemma4_kernels":
            self.seen[name] += 1
        elif not any(name.split(".")[0].strip("_").startswith(view) for view in self.VIEWS):
            self.seen["PyTorch's own"] += 1
        return function(*args, **(kwargs or {}))


def calls_of(step: DecodeStep) -> Counter[str]:
    recorder = Recorder()
    with recorder:
        step.run()
    return recorder.seen


def compiled_launches_of(step: DecodeStep) -> int | None:
    """Kernels of a step that this package's compiled module launches, by its own count; None where there is no module."""
    module = cuda_support.module_of(step.device)
    if module is None:
        return None
    before = module.launches()
    step.run()
    return int(module.launches() - before)


def launches_of(step: DecodeStep) -> int:
    """All kernels of a step, as the device's profiler counts them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step.run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def seconds_of(step: DecodeStep, repeats: int) -> tuple[float, str]:
    """The median of several steps, and how they were run."""
    if step.device.type != "cuda":
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            step.run()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds), "one call after the other"
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step.run()  # compiles what is compiled at the first call
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run()
    times = []
    for _ in range(repeats + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times[3:]), "one CUDA graph"


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description="One decode step of a Gemma 4 12B with random weights.")
    parser.add_argument("--context", type=int, default=4096, help="tokens in front of the step (default 4096)")
    parser.add_argument("--drafts", type=int, default=0, help="drafts to verify (default 0: plain decoding)")
    parser.add_argument("--batch", type=int, default=1, help="requests (default 1)")
    parser.add_argument("--layers", type=int, help="default: all 48 on a GPU, the first 6 elsewhere")
    parser.add_argument("--repeats", type=int, default=20, help="timed steps on a GPU (default 20)")
    parser.add_argument(
        "--card", default="rtx 3060", help="whose bandwidth is the floor, where no GPU is (default rtx 3060)"
    )
    parser.add_argument("--device", type=machine.known_device, default=None)
    parser.add_argument("--check-only", action="store_true", help="stop after the small model")
    arguments = parser.parse_args()
    device = arguments.device or machine.default_device()
    if arguments.batch * (arguments.drafts + 1) > DECODE_ROWS:
        parser.error(f"batch x (drafts + 1) must be at most {DECODE_ROWS} rows")

    print(f"{SMALL.name} of {SMALL.num_layers} layers against the reference: {check(device)}; rows of a verification have "
          "the bits that they have alone", flush=True)  # fmt: skip
    if arguments.check_only:
        return 0
    on_gpu = device.type == "cuda"
    num_layers = arguments.layers or (GEMMA4_12B.num_layers if on_gpu else len(GEMMA4_12B.pattern))
    step = DecodeStep(
        GEMMA4_12B, batch=arguments.batch, drafts=arguments.drafts, context=arguments.context, device=device,
        num_layers=num_layers,
    )  # fmt: skip
    step.lengths.fill_(arguments.context)
    step.run()
    weights, caches = step.weight_bytes, step.cache_bytes(arguments.context)
    print(f"\n{GEMMA4_12B.name}, {num_layers} of {GEMMA4_12B.num_layers} layers and the head, {LAYER_SCHEME} and "
          f"{HEAD_SCHEME}, random; {arguments.batch} x {step.rows} rows behind {arguments.context} tokens")  # fmt: skip
    print(f"  bytes      {weights / 1e9:.2f} GB of weights, {caches / 1e9:.3f} GB of keys and values")
    counted = ", ".join(f"{count} {name}" for name, count in calls_of(step).most_common())
    print(f"  calls      {counted}")
    compiled = compiled_launches_of(step)
    parts = [f"{launches_of(step)} in all"] if on_gpu else []
    parts += [f"{compiled} of compiled kernels"] if compiled is not None else []
    if parts:
        print(f"  launches   {', '.join(parts)}")
    for op, shape_class, backend in backends.served():
        print(f"  served     {op} ({shape_class}): {backend}")
    seconds, how = seconds_of(step, arguments.repeats if on_gpu else 3)
    name = machine.device_name(device)
    print(f"  measured   {seconds * 1e3:.1f} ms on {name}, {how}")
    card = cards.find(name) if on_gpu else cards.find(arguments.card)
    if card.bandwidth:
        floor = (weights + caches) / card.bandwidth / 1e9
        share = (
            f"; the step takes {seconds / floor:.2f} times that"
            if on_gpu
            else ", a prediction from the data sheet alone"
        )
        print(
            f"  floor      {floor * 1e3:.1f} ms at the {card.bandwidth:.0f} GB/s of {name if on_gpu else arguments.card}{share}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
