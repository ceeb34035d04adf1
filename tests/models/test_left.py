"""What `swap` leaves in transformers models, and models that an error or the meta device keeps as they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import zoo  # noqa: E402
from test_models import assert_close, run  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

import fastattn  # noqa: E402


class Secretive(modeling_llama.LlamaAttention):
    """Passes its attention a keyword that fastattn does not know."""

    def forward(
        self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kw
    ):
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, modeling_llama.eager_attention_forward
        )
        heads = (*hidden_states.shape[:2], -1, self.head_dim)
        q, k, v = (
            p(hidden_states).view(heads).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        out, weights = attention_interface(
            self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, secret_bias=self.layer_idx, **kw
        )
        return self.o_proj(out.flatten(2)), weights


def llama():
    return zoo.make("llama"), zoo.inputs("llama")


def attention_of(report):
    return [e for e in report.entries if "Attention" in e.before or "Secretive" in e.before]


def test_a_keyword_that_is_not_served_leaves_the_attention_of_its_config():
    model, x = llama()
    model.model.layers[1].self_attn.__class__ = Secretive
    eager = run(model, x)
    report = fastattn.swap(model)
    assert model.config._attn_implementation == "eager"
    assert len(attention_of(report)) == 2
    for entry in attention_of(report):
        assert entry.reason == "it passes secret_bias, which fastattn does not serve"
    assert report.swapped  # its norms
    assert_close(run(model, x), eager)


def test_hooks_on_attention_and_adapters_in_it_stay():
    model, x = llama()
    called = []
    attention = model.model.layers[0].self_attn
    attention.register_forward_hook(lambda *a: called.append(1))
    eager = run(model, x)
    report = fastattn.swap(model)
    assert all(e.after == "fastattn.attention" for e in attention_of(report))
    assert_close(run(model, x), eager)
    assert len(called) == 2


class Int8Linear(nn.Module):
    """A weight in int8, a scale a row."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter(
            (linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False
        )
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_quantised_projections_are_left_in_place_beneath_the_attention(name):
    model, x = zoo.make(name), zoo.inputs(name)
    for module in list(model.modules()):
        for child, linear in list(module.named_children()):
            if type(linear) is nn.Linear:
                setattr(module, child, Int8Linear(linear))
    eager = run(model, x)
    report = fastattn.swap(model)
    assert not report.left and len(attention_of(report)) == 2
    assert sum(isinstance(m, Int8Linear) for m in model.modules()) > 12
    assert_close(run(model, x), eager)


def test_the_meta_device():
    model = zoo.make("llama").to("meta")
    classes = [type(m) for m in model.modules()]
    report = fastattn.swap(model, pack=True)
    assert not report.swapped and {e.reason for e in report.entries} == {"the model is on the meta device"}
    assert [type(m) for m in model.modules()] == classes
    assert model.config._attn_implementation == "eager" and not fastattn.restore(model).entries


class Stubborn(nn.LayerNorm):
    def __setattr__(self, name, value):
        if name == "__class__":
            raise RuntimeError("stays what it is")
        super().__setattr__(name, value)


@pytest.mark.parametrize("swapped_before", [False, True])
def test_an_error_half_way_leaves_everything_as_it_was(swapped_before):
    model, x = llama()
    eager = run(model, x)
    if swapped_before:
        fastattn.swap(model)
    classes, kept = [type(m) for m in model.modules()], dict(vars(model))
    model.late = Stubborn(32)
    with pytest.raises(RuntimeError, match="stays what it is"):
        fastattn.swap(model)
    del model.late
    assert [type(m) for m in model.modules()] == classes and vars(model) == kept
    assert model.config._attn_implementation == ("fastattn" if swapped_before else "eager")
    assert_close(run(model, x), eager)
    fastattn.restore(model)
    assert all(torch.equal(t, eager[n]) for n, t in run(model, x).items())


def test_a_model_inside_another_is_found():
    inner, x = llama()
    eager = run(inner, x)
    outer = nn.ModuleDict({"backbone": inner, "norm": nn.LayerNorm(8)})
    report = fastattn.swap(outer)
    assert {e.path for e in attention_of(report)} == {
        f"backbone.model.layers.{n}.self_attn" for n in range(2)
    }
    assert_close(run(inner, x), eager)
    fastattn.restore(outer)
    assert inner.config._attn_implementation == "eager" and type(outer["norm"]) is nn.LayerNorm
