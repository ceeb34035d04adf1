"""`swap` and `restore`: what is replaced, what is left and why, and that everything comes back."""

from __future__ import annotations

import copy
import importlib
import io
import json
import pickle
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import fastattn
from fastattn import rows
from fastattn.recognise import Norm, is_candidate, recognise
from fastattn.tools import cli

swapping = importlib.import_module("fastattn.swap")  # fastattn.swap is the function


class LlamaRMSNorm(nn.Module):
    """RMSNorm as Llama has it: rounds before the weight, the result in the wider dtype."""

    def __init__(self, n=32, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)


class GemmaRMSNorm(nn.Module):
    """RMSNorm as Gemma has it: the weight is an offset from 1."""

    def __init__(self, n=32, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(n))

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.float())).type_as(x)


class CalledRMSNorm(LlamaRMSNorm):
    """Named like one, but no RMSNorm: the absolute mean."""

    def forward(self, hidden_states):
        return (
            self.weight * hidden_states / (hidden_states.abs().mean(-1, keepdim=True) + self.variance_epsilon)
        )


class FixedEpsRMSNorm(LlamaRMSNorm):
    """Does not follow its eps attribute."""

    def forward(self, hidden_states):
        x = hidden_states
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class GatedRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states, gate=None):
        return super().forward(hidden_states) * (1 if gate is None else gate)


class OwnForward(nn.LayerNorm):
    def forward(self, input):
        return super().forward(input) + 1


class Plain(nn.LayerNorm):
    """A subclass that changes nothing of importance."""


@pytest.mark.parametrize(
    "module, expected",
    [
        (LlamaRMSNorm(), Norm("rms_norm", "variance_epsilon", 0.0, "hidden_states", (True, False))),
        (GemmaRMSNorm(), Norm("rms_norm", "eps", 1.0, "x", (False, False))),
        (CalledRMSNorm(), "neither RMSNorm nor LayerNorm"),
        (FixedEpsRMSNorm(), "neither RMSNorm nor LayerNorm"),
        (GatedRMSNorm(), "not one tensor"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_norms_are_known_by_what_they_compute(module, expected):
    before = {n: p.clone() for n, p in module.named_parameters()}
    state = torch.get_rng_state()
    assert is_candidate(module)
    found = recognise(module)
    assert found == expected if isinstance(expected, Norm) else expected in found
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_modules_that_are_no_norms_are_not_run():
    for module in (
        nn.BatchNorm1d(4),
        nn.Linear(4, 4),
        nn.Dropout(0.1),
        nn.GroupNorm(2, 4),
        nn.Embedding(4, 4),
    ):
        assert not is_candidate(module)


class Model(nn.Module):
    """Norms of every kind; twice, so that the report has something to group."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "a": nn.LayerNorm(32),
                    "b": nn.RMSNorm(32),
                    "c": LlamaRMSNorm(),
                    "d": GemmaRMSNorm(),
                    "e": Plain(32),
                }
            )
            for _ in range(2)
        )
        self.odd = CalledRMSNorm()
        self.weights = nn.Softmax(-1)
        self.linear = nn.Linear(32, 32)
        for p in self.parameters():
            nn.init.normal_(p)

    def forward(self, x):
        for layer in self.layers:
            for norm in layer.values():
                x = x + self.linear(norm(x))
        return self.weights(self.odd(x))


REPLACED = 11


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def everything(model, x):
    """The result and all gradients."""
    x = x.clone().requires_grad_()
    out = model(x)
    out.square().sum().backward()
    grads = [x.grad, *(p.grad for p in model.parameters())]
    model.zero_grad()
    return [out.detach(), *grads]


def close(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4 * e.abs().max().item())


def test_same_objects_same_numbers_and_back(model):
    x = torch.randn(3, 5, 32)
    modules, classes = list(model.modules()), [type(m) for m in model.modules()]
    parameters, before = list(model.parameters()), everything(model, x)
    names = list(model.state_dict())
    report = fastattn.swap(model)
    assert len(report.swapped) == REPLACED
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(isinstance(m, c) for m, c in zip(modules, classes))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == names
    close(everything(model, x), before)

    assert len(fastattn.restore(model).swapped) == REPLACED
    assert [type(m) for m in model.modules()] == classes
    assert all(torch.equal(a, b) for a, b in zip(everything(model, x), before))
    assert not fastattn.restore(model).entries


def test_the_kernels_run(model, monkeypatch):
    called = []

    def watch(name):
        function = getattr(rows, name)

        def watched(*arguments, **keywords):
            called.append(name)
            return function(*arguments, **keywords)

        monkeypatch.setattr(rows, name, watched)

    for name in ("layer_norm", "rms_norm", "softmax"):
        watch(name)
    fastattn.swap(model)
    model(torch.randn(3, 32))
    assert called == ["layer_norm", "rms_norm", "rms_norm", "rms_norm", "layer_norm"] * 2 + ["softmax"]


def test_dry_run_changes_nothing(model):
    classes = [type(m) for m in model.modules()]
    planned = fastattn.swap(model, dry_run=True)
    assert [type(m) for m in model.modules()] == classes
    assert "would be replaced" in str(planned)
    assert planned.entries == fastattn.swap(model).entries


def test_twice_is_once(model):
    fastattn.swap(model)
    classes = [type(m) for m in model.modules()]
    again = fastattn.swap(model)
    assert [type(m) for m in model.modules()] == classes
    assert not again.swapped and sum(e.already for e in again.entries) == REPLACED
    fastattn.restore(model)
    assert not any(isinstance(m, swapping.StandIn) for m in model.modules())


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_swapped_and_restorable(model, way):
    x = torch.randn(3, 32)
    plain = model(x)
    fastattn.swap(model)
    expected = model(x)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(other(x), expected)
    fastattn.restore(other)
    assert torch.equal(other(x), plain)
    assert any(isinstance(m, swapping.StandIn) for m in model.modules())


def test_compiles_whole_and_recompiles_after_restore():
    model = nn.Sequential(nn.LayerNorm(32), GemmaRMSNorm(), nn.Softmax(-1))
    x = torch.randn(3, 32)
    plain = model(x)
    fastattn.swap(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), plain, rtol=1e-4, atol=1e-5)
    fastattn.restore(model)
    torch.testing.assert_close(compiled(x), plain)


def test_state_goes_both_ways(model):
    other = Model()
    fastattn.swap(model)
    other.load_state_dict(model.state_dict())
    model.load_state_dict(other.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [LlamaRMSNorm, GemmaRMSNorm])
def test_mixed_dtypes_as_the_original(norm, dtype):
    for own, given in ((torch.float32, dtype), (dtype, torch.float32), (dtype, dtype)):
        module = norm().to(own)
        nn.init.normal_(module.weight)
        x = torch.randn(5, 32, dtype=given)
        expected = module(x)
        fastattn.swap(module)
        assert isinstance(module, swapping.StandIn)
        torch.testing.assert_close(module(x), expected, rtol=2e-2, atol=2e-2)


def test_the_input_may_be_named():
    module = LlamaRMSNorm()
    x = torch.randn(3, 32)
    fastattn.swap(module)
    torch.testing.assert_close(module(hidden_states=x), module(x))


class Wrapped(torch.Tensor):
    pass


def hooked(module):
    module.register_forward_hook(lambda *a: None)


def parametrised(module):
    torch.nn.utils.parametrize.register_parametrization(module, "weight", nn.Identity())


def quantised(module):
    module.weight = nn.Parameter(torch.ones(32, dtype=torch.int8), requires_grad=False)


def subclassed(module):
    weight = torch.ones(32).as_subclass(Wrapped)
    module.weight = nn.Parameter(weight)


def narrow(module):
    module.weight = nn.Parameter(torch.ones(32).to(torch.float8_e4m3fn), requires_grad=False)


def instance_forward(module):
    module.forward = lambda x: x


@pytest.mark.parametrize("kind", [nn.LayerNorm, LlamaRMSNorm])
@pytest.mark.parametrize(
    "change, reason",
    [
        (hooked, "1 hook on it"),
        (parametrised, "parametrised"),
        (quantised, r"weight is quantised \(int8\)"),
        (subclassed, "weight is a Wrapped, a tensor subclass"),
        (narrow, "weight is float8_e4m3fn"),
        (instance_forward, "forward is replaced on the instance"),
    ],
)
def test_left_in_place_and_named(kind, change, reason):
    module = nn.Sequential(nn.Linear(32, 32), kind(32))
    change(module[1])
    before = type(module[1])
    report = fastattn.swap(module)
    assert type(module[1]) is before
    (entry,) = [e for e in report.entries if e.path == "1"]
    assert entry in report.left
    assert re.search(reason, entry.reason) and re.search(f"left: .*{reason}", str(report))


def test_subclasses():
    model = nn.ModuleDict(
        {"own": OwnForward(8), "plain": Plain(8), "dim": nn.Softmax(), "gated": GatedRMSNorm()}
    )
    reasons = {e.path: e.reason for e in fastattn.swap(model).entries}
    assert reasons["own"] == "a subclass with its own forward"
    assert reasons["dim"] is None and "not one tensor" in reasons["gated"]
    assert reasons["plain"] is None and isinstance(model["plain"], Plain)
    assert type(model["own"]) is OwnForward


def test_meta_device(model):
    model = model.to("meta")
    classes = [type(m) for m in model.modules()]
    report = fastattn.swap(model)
    assert [type(m) for m in model.modules()] == classes and not report.swapped
    assert all("meta device" in e.reason for e in report.entries if e.path != "odd")


class Stubborn(nn.LayerNorm):
    def __setattr__(self, name, value):
        if name == "__class__":
            raise RuntimeError("stays what it is")
        super().__setattr__(name, value)


def test_an_error_leaves_the_model_as_it_was(model):
    model.late = Stubborn(32)
    classes = [type(m) for m in model.modules()]
    with pytest.raises(RuntimeError, match="stays what it is"):
        fastattn.swap(model)
    assert [type(m) for m in model.modules()] == classes


def test_report_groups_like_modules(model):
    report = fastattn.swap(model)
    text = str(report)
    assert "layers.*.a (2)" in text and "FusedLlamaRMSNorm (rms_norm)" in text
    assert "FusedGemmaRMSNorm (rms_norm, weight + 1)" in text
    assert "odd" in text and "neither RMSNorm nor LayerNorm" in text
    assert f"{REPLACED} replaced, 1 left" in text
    assert "no attention, norm or softmax" in str(fastattn.swap(nn.Linear(2, 2)))


@pytest.mark.parametrize("function", [fastattn.swap, fastattn.restore])
def test_only_modules(function):
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got list"):
        function([])


class PlainAttention(nn.MultiheadAttention):
    """A subclass that changes nothing of importance."""


class OwnAttention(nn.MultiheadAttention):
    def forward(self, *arguments, **keywords):
        return super().forward(*arguments, **keywords)


def transformer():
    torch.manual_seed(0)
    model = nn.Transformer(32, 4, 2, 2, 48, dropout=0.0, batch_first=True)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def padded():
    hidden = torch.zeros(3, 7, dtype=torch.bool)
    hidden[0, 5:] = True
    hidden[1, :2] = True
    src, tgt = torch.randn(3, 7, 32), torch.randn(3, 6, 32)
    causal = torch.ones(6, 6).triu(1).bool()
    return (src, tgt), dict(src_key_padding_mask=hidden, memory_key_padding_mask=hidden, tgt_mask=causal)


@pytest.mark.parametrize("training", [True, False])
def test_torch_transformer_whole(training):
    model = transformer().train(training)
    modules, classes = list(model.modules()), [type(m) for m in model.modules()]
    arguments, masks = padded()

    def results():
        model.zero_grad()
        out = model(*arguments, **masks)
        out.square().sum().backward()
        return [out.detach(), *(p.grad.clone() for p in model.parameters())]

    with torch.no_grad():
        plain = model(*arguments, **masks)
    before = results()
    report = fastattn.swap(model)
    kinds = {e.after for e in report.swapped}
    names = (
        "Transformer TransformerEncoder TransformerDecoder TransformerEncoderLayer TransformerDecoderLayer"
    )
    names += " MultiheadAttention LayerNorm"
    assert kinds == {f"fastattn.nn.{name}" for name in names.split()} and not report.left
    assert all(a is b and isinstance(a, c) for a, b, c in zip(model.modules(), modules, classes, strict=True))
    close(results(), before)
    with torch.no_grad():
        torch.testing.assert_close(model(*arguments, **masks), plain, rtol=1e-4, atol=1e-4)
    assert not fastattn.swap(model).swapped
    other = pickle.loads(pickle.dumps(model))
    fastattn.restore(model)
    assert [type(m) for m in model.modules()] == classes
    assert all(torch.equal(a, b) for a, b in zip(results(), before))
    with torch.no_grad():
        torch.testing.assert_close(other(*arguments, **masks), plain, rtol=1e-4, atol=1e-4)
    fastattn.restore(other)
    assert [type(m) for m in other.modules()] == classes


def test_the_attention_kernel_runs_and_padding_does_not(monkeypatch):
    from fastattn import functional

    lengths = []

    def attention(q, k, v, **arguments):
        lengths.append((q.shape[2], k.shape[2]))
        return original(q, k, v, **arguments)

    original = functional.attention
    model, (arguments, masks) = transformer(), padded()
    fastattn.swap(model)
    monkeypatch.setattr(functional, "attention", attention)
    with torch.no_grad():
        model.encoder(arguments[0], src_key_padding_mask=masks["src_key_padding_mask"])
    assert lengths == [(17, 17)] * 2, "17 of 21 tokens are real"


def test_a_hooked_attention_in_a_swapped_layer_is_still_called():
    model, (arguments, masks) = transformer().eval(), padded()
    with torch.no_grad():
        plain = model(*arguments, **masks)
    called = []
    layer = model.encoder.layers[0]
    layer.self_attn.register_forward_hook(lambda *a: called.append(1))
    report = fastattn.swap(model)
    (left,) = report.left
    assert left.path == "encoder.layers.0.self_attn" and "1 hook on it" in left.reason
    with torch.no_grad():
        torch.testing.assert_close(model(*arguments, **masks), plain, rtol=1e-4, atol=1e-4)
    assert called


class Scaled(nn.Linear):
    """A Linear whose weight is kept in int8."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.scale, self.bias = scale, linear.bias
        self.weight = nn.Parameter(
            (linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False
        )

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


def test_quantised_layers_in_a_swapped_one_are_called():
    model, (arguments, masks) = transformer(), padded()
    for layer in (*model.encoder.layers, *model.decoder.layers):
        layer.linear1, layer.linear2 = Scaled(layer.linear1), Scaled(layer.linear2)
        layer.self_attn.out_proj = Scaled(layer.self_attn.out_proj)
    model.train()
    attention = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    plain = model.decoder.layers[0].linear1(torch.randn(2, 32))
    assert plain.shape == (2, 48) and len(attention) == 6
    report = fastattn.swap(model)
    assert not report.left
    ours = model(*arguments, **masks)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Scaled):
                linear = nn.Linear(child.in_features, child.out_features)
                linear.weight = nn.Parameter(child.weight * child.scale)
                linear.bias = child.bias
                setattr(module, name, linear)
    fastattn.restore(model)
    torch.testing.assert_close(ours, model(*arguments, **masks), rtol=1e-4, atol=1e-4)


def test_subclasses_of_attention():
    model = nn.ModuleDict(
        {"plain": PlainAttention(8, 2), "own": OwnAttention(8, 2), "ours": fastattn.nn.LayerNorm(8)}
    )
    entries = {e.path: e for e in fastattn.swap(model).entries}
    assert entries["own"].reason == "a subclass with its own forward" and type(model["own"]) is OwnAttention
    assert isinstance(model["plain"], PlainAttention) and isinstance(
        model["plain"], fastattn.nn.MultiheadAttention
    )
    assert entries["ours"].already and type(model["ours"]) is fastattn.nn.LayerNorm
    fastattn.restore(model)
    assert type(model["plain"]) is PlainAttention and type(model["ours"]) is fastattn.nn.LayerNorm


def test_a_layer_with_a_hook_says_what_its_fused_path_does():
    layer = nn.TransformerEncoderLayer(8, 2)
    layer.register_forward_hook(lambda *a: None)
    reasons = {e.path: e.reason for e in fastattn.swap(layer).entries}
    assert "fused path" in reasons[""] and reasons["self_attn"] is None and reasons["norm1"] is None


def test_the_command_reports_without_weights(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    sizes = dict(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, vocab_size=99
    )
    transformers.LlamaConfig(**sizes, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    assert cli.main(["swap", str(tmp_path), "--report"]) == 0
    table = capsys.readouterr().out
    assert "model.layers.*.self_attn (3)" in table and "fastattn.attention" in table
    assert cli.main(["swap", str(tmp_path), "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert sum(e["after"] == "fastattn.attention" for e in entries) == 3
    transformers.BertConfig(**sizes, architectures=["BertModel"]).save_pretrained(tmp_path)
    assert cli.main(["swap", str(tmp_path), "--pack"]) == 0
    table = capsys.readouterr().out
    assert re.search("encoder +BertEncoder +packs padded batches", table)
    assert cli.main(["swap", "torch.nn:Linear"]) == 2
    assert "torch.nn:Linear cannot be called" in capsys.readouterr().err


def test_the_command_as_a_user_runs_it():
    line = [sys.executable, "-m", "fastattn", "swap", "torch.nn:Transformer", "--report"]
    made = subprocess.run(line, capture_output=True, text=True)
    assert made.returncode == 0 and "encoder.layers.* (6)" in made.stdout


def test_float64_is_left_to_torch(model):
    report = fastattn.swap(model.double())
    assert all("float64" in e.reason for e in report.entries if e.path not in ("odd", "weights"))
