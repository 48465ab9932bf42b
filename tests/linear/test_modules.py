"""QuantizedLinear, QuantizedEmbedding, and their way into models."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping

import pytest
import torch
from linear_helpers import gguf_rows
from linear_weights import random_weight
from small_models import text_model
from torch import nn
from weight_files import gguf_file

from gemma4_kernels import (
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedWeight,
    ShapeError,
    open_weights,
    quantized_embedding,
    quantized_linear,
    replace_linear,
)
from gemma4_kernels.linear.schemes import SCHEMES


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def assert_same(got: QuantizedWeight, expected: QuantizedWeight):
    assert (got.scheme, got.shape, got.group_size) == (expected.scheme, expected.shape, expected.group_size)
    assert got.tensors().keys() == expected.tensors().keys()
    for name, tensor in got.tensors().items():
        assert tensor.dtype == getattr(expected, name).dtype
        assert torch.equal(tensor.view(torch.uint8), getattr(expected, name).view(torch.uint8)), name


# Modules ------------------------------------------------------------------------------------------------------------


def test_linear_is_the_function():
    weight, bias, x = random_weight("Q4_K"), drawn(70), drawn(2, 3, 512)
    module = QuantizedLinear(weight, bias)
    assert (module.in_features, module.out_features) == (512, 70)
    assert torch.equal(module(x), quantized_linear(x, weight, bias))
    assert "in_features=512, out_features=70, bias=True" in repr(module)
    assert "Q4_K" in repr(module)


def test_embedding_is_the_function_times_its_scale():
    weight, ids = random_weight("Q6_K"), torch.tensor([[1, 2, 69]])
    rows = quantized_embedding(ids, weight, torch.float16)
    assert torch.equal(QuantizedEmbedding(weight, torch.float16)(ids), rows)
    scaled = QuantizedEmbedding(weight, torch.float16, embed_scale=62.0)(ids)
    assert torch.equal(scaled, rows * torch.tensor(62.0).half())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("change", ["half", "bfloat16", "double"])
def test_a_change_of_dtype_leaves_the_weight_alone(scheme, change):
    weight = random_weight(scheme)
    module = QuantizedLinear(weight, drawn(70))
    getattr(module, change)()
    assert_same(module.weight, weight)
    assert module.bias.dtype != torch.float32


def test_an_embedding_gives_the_dtype_of_its_model():
    module = QuantizedEmbedding(random_weight("Q4_0"), torch.float32)
    assert module(torch.tensor([1])).dtype == torch.float32
    assert module.bfloat16()(torch.tensor([1])).dtype == torch.bfloat16


def test_modules_move():
    module = nn.Sequential(QuantizedLinear(random_weight("NF4_NESTED")))
    assert module.to("meta")[0].weight.device.type == "meta"
    assert module.to_empty(device="cpu")[0].weight.scales.dtype == torch.uint8


def test_a_state_dict_brings_the_weight_back():
    weight, x = random_weight("Q4_1"), drawn(2, 160)
    module = QuantizedLinear(weight)
    other = QuantizedLinear(random_weight("Q4_1", seed=5))
    assert not torch.equal(other(x), module(x))
    state = module.state_dict()
    assert set(state) == {"quantized.codes", "quantized.scales", "quantized.offsets"}
    other.load_state_dict(state)
    assert_same(other.weight, weight)
    with pytest.raises(RuntimeError, match=r"quantized\.high"):
        other.load_state_dict(QuantizedLinear(random_weight("Q5_1")).state_dict())


def test_a_compiled_model_with_quantised_layers():
    model = nn.Sequential(
        QuantizedEmbedding(random_weight("Q4_0"), torch.float32), QuantizedLinear(random_weight("GPTQ"))
    )
    ids = torch.tensor([[3, 5]])
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(ids), model(ids))


def test_what_is_no_quantised_weight_is_refused():
    with pytest.raises(TypeError, match="weight must be a QuantizedWeight, got Tensor"):
        QuantizedLinear(drawn(3, 32))
    with pytest.raises(ShapeError, match="bias must have shape"):
        QuantizedLinear(random_weight("Q4_0"), drawn(3))


def test_a_state_of_another_scheme_is_refused_and_nothing_is_rounded():
    module = QuantizedLinear(random_weight("W4A16"))
    before = module.weight.scales.clone()
    with pytest.raises(RuntimeError, match=r"quantized\.scales must be torch.bfloat16 as in W4A16, got torch.float16"):
        module.load_state_dict(QuantizedLinear(random_weight("Q4_0")).state_dict())
    assert torch.equal(module.weight.scales, before)


def test_tensors_of_a_state_dict_become_dense():
    weight = random_weight("Q4_0")
    state = QuantizedLinear(weight).state_dict()
    state["quantized.codes"] = state["quantized.codes"].T.contiguous().T
    module = QuantizedLinear(random_weight("Q4_0", seed=5))
    module.load_state_dict(state, assign=True)
    assert module.weight.codes.is_contiguous()
    assert_same(module.weight, weight)


@pytest.mark.parametrize("inference", [True, False])
def test_a_loaded_weight_is_packed_again(inference):
    x = drawn(1, 160, dtype=torch.bfloat16)
    with torch.inference_mode(inference):
        module, other = (QuantizedLinear(random_weight("Q4_0", (80, 160), seed=seed)) for seed in (0, 5))
        assert not torch.equal(module(x), other(x))
        module.load_state_dict(other.state_dict())
        assert torch.equal(module(x), other(x))


# replace_linear -----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 96)
        self.down = nn.Linear(96, 64, bias=False)


class Model(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(64, 50, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer.down(torch.tanh(layer.up(x)))
        return self.head(x)


def quantized(model: nn.Module) -> dict[str, QuantizedWeight]:
    """All weights, which are replaced by the quantised ones' values: the dense model is then what is expected."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            found[name] = QuantizedWeight.quantize(parameter.detach(), "Q8_0", name=name)
            parameter.data = found[name].dequantize(parameter.dtype)
    return found


def test_a_model_is_replaced_under_its_names():
    model = Model(tied=False)
    weights = quantized(model)
    ids = torch.tensor([[1, 2, 3]])
    expected = model(ids)
    done = replace_linear(model, weights)
    assert set(done.modules) == {"embed", "head", "layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"}
    assert done.unmatched == ()
    assert isinstance(model.layers[1].up, QuantizedLinear)
    assert not any(parameter.dim() == 2 for parameter in model.parameters())
    torch.testing.assert_close(model(ids), expected)


@pytest.mark.parametrize("given", ["embed.weight", "head.weight"])
def test_a_tied_head_shares_the_weight(given):
    model = Model()
    weights = quantized(model)
    (tied,) = (weights.pop(name) for name in ("embed.weight",))
    done = replace_linear(model, {**weights, given: tied})
    assert {"embed", "head"} <= set(done.modules)
    assert model.embed.quantized is model.head.quantized
    model.to("meta")
    assert model.embed.weight.codes is model.head.weight.codes


class OneAtATime(Mapping):
    """Weights that are made when they are asked for, and a count of the dense ones that are left."""

    def __init__(self, model: nn.Module) -> None:
        self.model = [weakref.ref(p) for p in model.parameters() if p.dim() == 2]
        self.weights = quantized(model)
        self.left = []

    def __iter__(self):
        return iter(self.weights)

    def __len__(self):
        return len(self.weights)

    def __getitem__(self, name):
        gc.collect()
        self.left.append(sum(reference() is not None for reference in self.model))
        return self.weights[name]


def test_memory_is_freed_as_it_goes():
    model = Model()
    weights = OneAtATime(model)
    replace_linear(model, weights)
    assert weights.left == [5, 4, 3, 2, 1]


def test_a_transformers_model():
    model = text_model(tie_word_embeddings=True)
    weights = quantized(model)
    tokens = torch.tensor([[2, 30, 41, 7, 19]])
    with torch.inference_mode():
        expected = model(tokens).logits
        done = replace_linear(model, weights)
        assert len(done.modules) == len(weights) + 1
        assert model.model.embed_tokens.quantized is model.lm_head.quantized
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
        model.generate(tokens, max_new_tokens=3, do_sample=False)


def test_a_model_on_meta_takes_the_weights_where_they_are():
    real = Model()
    weights = quantized(real)
    with torch.device("meta"):
        model = Model()
    replace_linear(model, weights)
    assert model.layers[0].up.weight.device.type == "cpu"


NAMES = {
    "layers.0.up": "layers.0.up",
    "layers.0.up.weight": "layers.0.up",
    "0.up.weight": "layers.0.up",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_with_and_without_what_surrounds_them(name):
    done = replace_linear(Model(), {name: random_weight("Q4_0", (96, 64))})
    assert done.modules == (NAMES[name],)


def test_names_of_gguf_files():
    model = nn.Module()
    model.model = nn.Module()
    model.model.embed_tokens = nn.Embedding(50, 64)
    model.lm_head = nn.Linear(64, 50, bias=False)
    layer = nn.Module()
    layer.self_attn, layer.mlp = nn.Module(), nn.Module()
    projections = {"self_attn": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}
    for part, letters in projections.items():
        for letter in letters:
            getattr(layer, part).add_module(f"{letter}_proj", nn.Linear(64, 64, bias=False))
    model.model.layers = nn.ModuleList([layer])
    names = ["token_embd", "output", *(f"blk.0.{name}" for name in (
        "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"
    ))]  # fmt: skip
    shapes = [(50, 64)] * 2 + [(64, 64)] * 7
    weights = {f"{name}.weight": random_weight("Q4_0", shape) for name, shape in zip(names, shapes, strict=True)}
    done = replace_linear(model, weights)
    assert done.modules == (
        "model.embed_tokens", "lm_head",
        *(f"model.layers.0.{part}.{letter}_proj" for part, letters in projections.items() for letter in letters),
    )  # fmt: skip


def test_one_module_in_two_places_stays_one():
    for name in ("a", "b"):
        model = nn.Module()
        model.inner = nn.Module()
        model.inner.a = model.inner.b = nn.Linear(64, 96)
        done = replace_linear(model, {name: random_weight("Q4_0", (96, 64))})
        assert done.modules == ("inner.a", "inner.b")
        assert model.inner.a is model.inner.b
        assert isinstance(model.inner.a, QuantizedLinear)


def test_names_of_gguf_files_mean_the_text_model():
    model = nn.Module()
    for part in ("vision_model", "language_model"):
        layer = nn.Module()
        layer.mlp = nn.Module()
        layer.mlp.up_proj = nn.Linear(64, 96)
        whole = nn.Module()
        whole.layers = nn.ModuleList([layer])
        setattr(model, part, whole)
    weight = random_weight("Q4_0", (96, 64))
    assert replace_linear(model, {"blk.0.ffn_up.weight": weight}).modules == ("language_model.layers.0.mlp.up_proj",)
    with pytest.raises(ValueError, match="give the part"):
        replace_linear(nn.ModuleDict({"a": Block(), "b": Block()}), {"up": weight})


def test_layers_that_others_look_into_are_refused():
    weight = random_weight("Q4_0", (64, 64))
    with pytest.raises(TypeError, match="out_proj must compute"):
        replace_linear(nn.MultiheadAttention(64, 4), {"out_proj": weight})
    parametrised = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)))
    with pytest.raises(TypeError, match=r"0 must .*parametrised"):
        replace_linear(parametrised, {"0": weight})
    with pytest.raises(ValueError, match="which the model has not"):
        replace_linear(nn.Linear(64, 64), {"": weight})


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def test_what_cannot_be_replaced_is_named_before_anything_is():
    good, other = random_weight("Q4_0", (96, 64)), random_weight("Q4_0", (70, 64))
    model = Model()
    before = model.layers[0].up
    for error, text, weights in [
        (ValueError, "got blk.7.attn_q.weight, which the model has not", {"blk.7.attn_q.weight": good}),
        (ValueError, "must have one weight, got 1.up and layers.1.up", {"1.up": good, "layers.1.up": good}),
        (ValueError, "up must name one module, got layers.0.up and layers.1.up", {"up": good}),
        (ShapeError, r"1.up must have shape \(96, 64\) for layers.1.up, got \(70, 64\)", {"1.up": other}),
    ]:  # fmt: skip
        with pytest.raises(error, match=text):
            replace_linear(model, {"0.up": good} | weights if "up" not in weights else weights)
        assert model.layers[0].up is before
    with pytest.raises(TypeError, match="must map names"):
        replace_linear(model, [good])
    model.layers[0].up = Own(64, 96)
    with pytest.raises(TypeError, match="up must compute what Linear does, got Own"):
        replace_linear(model, {"0.up": good})
    model.embed = nn.Embedding(50, 64, max_norm=1.0)
    with pytest.raises(TypeError, match="max_norm"):
        replace_linear(model, {"embed": random_weight("Q4_0", (50, 64))})


def test_weights_that_nobody_wants_may_be_left_out():
    done = replace_linear(
        Model(), {"0.up": random_weight("Q4_0", (96, 64)), "v.blk": random_weight("Q4_0")}, strict=False
    )
    assert done == (("layers.0.up",), ("v.blk",))


def test_a_file(tmp_path):
    model = Model()
    rows = gguf_rows("Q4_0", 96, 64)
    path = tmp_path / "up.gguf"
    path.write_bytes(gguf_file({"layers.0.up.weight": ("Q4_0", (96, 64), rows.tobytes())}))
    assert replace_linear(model, open_weights(path)).modules == ("layers.0.up",)
    assert_same(model.layers[0].up.weight, QuantizedWeight.from_gguf(torch.from_numpy(rows), "Q4_0", (96, 64)))
    path.write_bytes(gguf_file({"layers.0.up.weight": ("Q4_0", (64, 64), rows[:64].tobytes())}))
    with pytest.raises(ShapeError, match=r"must have shape \(96, 64\)"):
        replace_linear(Model(), open_weights(path))
