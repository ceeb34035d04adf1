"""fastattn.nn under torch's machinery: compile, export, autocast, checkpointing, FSDP2, torch.func."""

import copy
import os
import socket
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn import masks
from fastattn import nn as fnn
from fastattn.masks import words

E, H = 24, 4


def encoder(**keywords):
    layer = fnn.TransformerEncoderLayer(E, H, 40, batch_first=True, **keywords)
    return fnn.TransformerEncoder(layer, 2, fnn.LayerNorm(E))


def batch():
    padded = torch.zeros(3, 10, dtype=torch.bool)
    padded[1, 6:] = True
    padded[2, 1:] = True
    return torch.randn(3, 10, E), padded


def attention_call(module, x, padded):
    return module(x, x, x, key_padding_mask=padded, need_weights=False)[0]


def causal_call(module, x, padded):
    mask = torch.ones(10, 10, dtype=torch.bool).triu(1)
    return module(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]


def weights_call(module, x, padded):
    out, weights = module(x, x, x)
    return torch.cat((out, weights), -1)


def encoder_call(module, x, padded):
    return module(x, src_key_padding_mask=padded)


def transformer_call(module, x, padded):
    mask = torch.nn.Transformer.generate_square_subsequent_mask(10)
    return module(x, x, tgt_mask=mask, tgt_is_causal=True, memory_key_padding_mask=padded)


CALLS = {
    "attention": (lambda: fnn.MultiheadAttention(E, H, batch_first=True), attention_call),
    "attention, causal": (lambda: fnn.MultiheadAttention(E, H, batch_first=True), causal_call),
    "attention, weights": (lambda: fnn.MultiheadAttention(E, H, batch_first=True), weights_call),
    "encoder": (lambda: encoder(dropout=0.0), encoder_call),
    "transformer": (lambda: fnn.Transformer(E, H, 1, 1, 40, 0.0, batch_first=True), transformer_call),
    "norms": (
        lambda: torch.nn.Sequential(fnn.LayerNorm(E), fnn.RMSNorm(E), fnn.Softmax(-1)),
        lambda m, x, p: m(x),
    ),
    "grouped": (
        lambda: fnn.GroupedQueryAttention(E, H, 2, qk_norm="rms_norm", rope=fnn.RotaryEmbedding(6)),
        lambda m, x, p: m(x, mask=masks.SlidingWindow(3, 0)),
    ),
    "shaw": (lambda: fnn.ShawRelativeAttention(E, H, 3), lambda m, x, p: m(x, is_causal=True)),
    "transformer-xl": (lambda: fnn.TransformerXLAttention(E, H), lambda m, x, p: m(x, x)),
    "feed forward": (lambda: torch.nn.Sequential(fnn.FeedForward(E, 8, "swiglu")), lambda m, x, p: m(x)),
    "add norm": (lambda: fnn.AddNorm(E), lambda m, x, p: m(x, x)),
}


def compiles(name, backend):
    torch._dynamo.reset()
    make, call = CALLS[name]
    module = make()
    x, padded = batch()
    x.requires_grad_()
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    y, expected = compiled(module, x, padded), call(module, x, padded)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)
    dy = torch.randn_like(y)
    needs = [x, *(p for p in module.parameters())]
    got = torch.autograd.grad(y, needs, dy, allow_unused=True)
    for a, e in zip(got, torch.autograd.grad(expected, needs, dy, allow_unused=True)):
        if e is not None:
            torch.testing.assert_close(a, e, atol=1e-4, rtol=1e-3)
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(module, x, padded), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CALLS)
def test_compiles_whole(name):
    compiles(name, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_compiles_whole_with_inductor(name):
    compiles(name, "inductor")


class Exported(torch.nn.Module):
    """A module and the way it is called, as one module."""

    def __init__(self, inner, call):
        super().__init__()
        self.inner, self.call = inner.eval(), call

    def forward(self, *inputs):
        return self.call(self.inner, *inputs)


def bias_call(module, x, padded):
    """T5's bias or ALiBi's slopes, in an attention."""
    q = x.unflatten(-1, (H, -1)).transpose(1, 2)
    if isinstance(module, fnn.ALiBi):
        return fastattn.attention(q, q, q, alibi_slopes=module())
    return fastattn.attention(q, q, q, bias=module(10, 10), scale=1.0)


def decoder_call(module, x, padded):
    mask = torch.ones(10, 10, dtype=torch.bool).triu(1)
    return module(x, x, tgt_mask=mask, tgt_is_causal=True, memory_key_padding_mask=padded)


EXPORTS = CALLS | {
    "encoder layer": (
        lambda: fnn.TransformerEncoderLayer(E, H, 40, batch_first=True),
        lambda m, x, p: m(x, src_key_padding_mask=p),
    ),
    "decoder layer": (lambda: fnn.TransformerDecoderLayer(E, H, 40, batch_first=True), decoder_call),
    "decoder": (
        lambda: fnn.TransformerDecoder(fnn.TransformerDecoderLayer(E, H, 40, batch_first=True), 2),
        decoder_call,
    ),
    "multi-query": (lambda: fnn.MultiQueryAttention(E, H), lambda m, x, p: m(x, is_causal=True)),
    "sinusoidal": (lambda: fnn.SinusoidalPositionalEncoding(E), lambda m, x, p: m(x)),
    "rotary": (lambda: fnn.RotaryEmbedding(6), lambda m, x, p: m(x)),
    "t5": (lambda: fnn.T5RelativeBias(H), bias_call),
    "alibi": (lambda: fnn.ALiBi(H), bias_call),
}
# What is computed by torch's own operations.
WITHOUT_OPS = ("feed forward", "sinusoidal", "rotary")


def test_exports_are_of_all_modules():
    made = [type(module).__name__ for make, _ in EXPORTS.values() for module in make().modules()]
    assert set(fnn.__all__) <= set(made)


@pytest.mark.parametrize("name", EXPORTS)
def test_export(name):
    make, call = EXPORTS[name]
    model, (x, padded) = Exported(make(), call), batch()
    program = torch.export.export(model, (x, padded))
    torch.testing.assert_close(program.module()(x, padded), model(x, padded), atol=1e-5, rtol=1e-4)
    targets = {str(node.target) for node in program.graph.nodes}
    assert any(target.startswith("fastattn.") for target in targets) == (name not in WITHOUT_OPS)


def masked_weights_call(module, x, padded):
    out, weights = module(x, x, x, key_padding_mask=padded)
    return torch.cat((out, weights), -1)


def masked_causal_call(module, x, padded):
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    return module(x, x, x, key_padding_mask=padded, attn_mask=mask, need_weights=False)[0]


def lower_right_call(module, x, padded):
    return module(x, mask=masks.CausalLowerRight(), src_key_padding_mask=padded)


DYNAMIC = {
    "attention": (CALLS["attention"][0], attention_call),
    "attention, weights": (CALLS["attention"][0], masked_weights_call),
    "attention, causal": (CALLS["attention"][0], masked_causal_call),
    "encoder": (lambda: encoder(dropout=0.0), encoder_call),
    "encoder, mask": (lambda: encoder(dropout=0.0), lower_right_call),
}


@pytest.mark.parametrize(
    ("name", "strict"), [*((name, False) for name in DYNAMIC), ("attention, causal", True), ("encoder", True)]
)
def test_export_with_dynamic_sizes_and_padding(name, strict):
    """One program for every batch and length, granules of the mask included: below, at and beyond 64 keys."""
    make, call = DYNAMIC[name]
    model, (x, padded) = Exported(make(), call), batch()
    sizes = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("length", min=2, max=4096)}
    program = torch.export.export(
        model, (x, padded), dynamic_shapes=((sizes, sizes),), strict=strict
    ).module()
    for n, length in ((3, 10), (2, 64), (5, 130), (2, 3)):
        y, hidden = torch.randn(n, length, E), torch.rand(n, length) > 0.6
        hidden[:, 0], hidden[1] = False, True
        torch.testing.assert_close(program(y, hidden), model(y, hidden), atol=1e-5, rtol=1e-4)


def test_nothing_of_a_trace_lives_on():
    """The tables of words are kept for later calls: not those that were made while export traced."""
    words.low_bits.cache_clear(), words.lanes.cache_clear()
    module, (x, padded) = CALLS["attention"][0]().eval(), batch()
    torch.export.export(module, (x, x, x), dict(key_padding_mask=padded))
    _, weights = module(x, x, x, attn_mask=torch.rand(x.shape[1], x.shape[1]) > 0.7)
    assert type(weights.detach()) is torch.Tensor and weights.isfinite().all()


@pytest.mark.parametrize("name", ["attention", "attention, weights", "encoder", "transformer"])
def test_autocast(name):
    make, call = CALLS[name]
    module, (x, padded) = make(), batch()
    theirs = getattr(torch.nn, type(module).__name__)
    plain = copy.deepcopy(module)
    expected = call(module, x, padded)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(plain, x, padded)
    torch.testing.assert_close(y.float(), expected, atol=8e-2, rtol=8e-2)
    y.float().square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in plain.parameters())
    assert isinstance(module, theirs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_replays_dropout(reentrant):
    model = encoder(dropout=0.4)
    x, padded = batch()
    results = []
    for recompute in (False, True):
        y = x.clone().requires_grad_()
        torch.manual_seed(3)
        call = (lambda t: checkpoint(model, t, None, padded, use_reentrant=reentrant)) if recompute else None
        out = call(y) if recompute else model(y, None, padded)
        model.zero_grad()
        out.square().sum().backward()
        results.append([out, y.grad, *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_ensembles_by_vmap():
    """The way of torch.func's tutorial: parameters stacked, one call for all."""
    models = [encoder(dropout=0.0).eval() for _ in range(3)]
    x, padded = batch()
    parameters, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")

    def call(p, b):
        return torch.func.functional_call(base, (p, b), (x,), {"src_key_padding_mask": padded})

    y = torch.vmap(call)(parameters, buffers)
    for n, model in enumerate(models):
        torch.testing.assert_close(y[n], model(x, src_key_padding_mask=padded), atol=1e-5, rtol=1e-4)


def test_gradients_of_functional_calls():
    model = fnn.MultiheadAttention(E, H, batch_first=True)
    x, padded = batch()
    parameters = dict(model.named_parameters())

    def loss(p):
        return torch.func.functional_call(model, p, (x, x, x), {"key_padding_mask": padded})[0].square().sum()

    grads = torch.func.grad(loss)(parameters)
    loss(parameters).backward()
    for name, p in parameters.items():
        torch.testing.assert_close(grads[name], p.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["attention", "attention, weights", "attention, causal", "encoder"])
def test_gradients_an_item_with_padding_of_its_own(name):
    """Gradients by vmap(grad), the mask of each item among what is mapped over."""
    make, call = DYNAMIC[name]
    model, (x, padded) = make().eval(), batch()
    x, padded = torch.stack((x, x.flip(0), x + 1)), torch.stack((padded, padded.flip(0), padded.roll(1, 0)))
    parameters = dict(model.named_parameters())

    def loss(p, x, padded):
        def inner(*inputs, **keywords):
            return torch.func.functional_call(model, p, inputs, keywords)

        return call(inner, x, padded).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, padded)
    for n in range(3):
        one = torch.autograd.grad(loss(parameters, x[n], padded[n]), list(parameters.values()))
        for grad, expected in zip(grads.values(), one):
            torch.testing.assert_close(grad[n], expected, atol=1e-4, rtol=1e-3)


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _sharded(rank, port, results):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = encoder(dropout=0.0)
    plain = copy.deepcopy(model)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    x, padded = batch()
    y = model(x, src_key_padding_mask=padded)
    y.square().sum().backward()
    expected = plain(x, src_key_padding_mask=padded)
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected)
    for p, q in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, atol=1e-4, rtol=1e-3)
    results.put(rank)
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32", reason="gloo's processes are started by fork or spawn")
def test_fsdp2_on_two_processes():
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    torch.multiprocessing.spawn(_sharded, (_free_port(), results), nprocs=2)
    assert {results.get(timeout=10) for _ in range(2)} == {0, 1}


GLOBAL_HOOKS = {
    "forward": lambda seen: torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.add(module)
    ),
    "forward pre": lambda seen: torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, *_: seen.add(module)
    ),
    "backward": lambda seen: torch.nn.modules.module.register_module_full_backward_hook(
        lambda module, *_: seen.add(module)
    ),
    "backward pre": lambda seen: torch.nn.modules.module.register_module_full_backward_pre_hook(
        lambda module, *_: seen.add(module)
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", GLOBAL_HOOKS)
def test_hooks_on_all_modules_see_every_child(kind, training):
    """Work that is fused or drawn another way is done by the child where somebody watches."""
    relu = torch.nn.ReLU()
    models = [
        (fnn.TransformerEncoderLayer(E, H, 40, 0.2, relu, batch_first=True), 1),
        (fnn.TransformerDecoderLayer(E, H, 40, 0.2, relu, batch_first=True, norm_first=True), 2),
        (fnn.AddNorm(E, dropout=0.2), 2),
        (fnn.FeedForward(E, 40, dropout=0.2), 1),
    ]
    for model, inputs in models:
        x = torch.randn(2, 7, E, requires_grad=True)
        seen = set()
        handle = GLOBAL_HOOKS[kind](seen)
        try:
            y = model.train(training)(*[x] * inputs)
            y.sum().backward()
        finally:
            handle.remove()
        assert not [name for name, module in model.named_modules() if module not in seen]
        del y


def test_a_hook_on_an_activation_is_called():
    layer = fnn.TransformerEncoderLayer(E, H, 40, 0.0, torch.nn.GELU(), batch_first=True).eval()
    x = torch.randn(2, 40, E)
    seen = []
    expected = layer(x)
    layer.activation.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    for mode in (torch.enable_grad(), torch.no_grad()):
        with mode:
            torch.testing.assert_close(layer(x), expected)
    assert seen == [(2, 40, 40)] * 2
