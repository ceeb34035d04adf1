"""fastattn.nn's encoder, decoder and Transformer against torch.nn's; packing."""

import copy
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from pairwise import name_of, pairwise

from fastattn import masks
from fastattn import nn as fnn
from fastattn.nn import encoder, multihead, packing

E, H, N, L, S = 24, 4, 3, 6, 9

LAYER_FACTORS = dict(
    layout=("batch-first", "sequence-first", "unbatched"),
    activation=("relu", "gelu", F.gelu, F.silu, torch.nn.ReLU()),
    norm_first=(False, True),
    bias=(True, False),
    padding=("", "pad-right", "pad-holes", "pad-infinite", "pad-float"),
    mask=("", "causal", "hint", "window", "random", "float", "heads"),
    training=(True, False),
    dtype=(torch.float64, torch.float32),
)
CASES = pairwise(**LAYER_FACTORS)


def options_of(case):
    """What a layer and a whole Transformer take alike."""
    return dict(
        dropout=0.0,
        activation=case["activation"],
        layer_norm_eps=1e-4,
        batch_first=case["layout"] == "batch-first",
        norm_first=case["norm_first"],
        bias=case["bias"],
        dtype=case["dtype"],
    )


def layer_arguments(case):
    return dict(d_model=E, nhead=H, dim_feedforward=40) | options_of(case)


def randomised(module, case):
    generator = torch.Generator().manual_seed(1)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64).mul(0.3).to(p.dtype)
    return module.train(case["training"])


def draw(case, length, seed):
    shape = {"batch-first": (N, length, E), "sequence-first": (length, N, E)}.get(case["layout"], (length, E))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(case["dtype"]).requires_grad_()


def padding_of(case, length):
    batch = 1 if case["layout"] == "unbatched" else N
    padded = torch.zeros(batch, length, dtype=torch.bool)
    padded[-1, 4:] = True
    if case["padding"] == "pad-holes":
        padded[0, 2] = True
    generator = torch.Generator().manual_seed(4)
    float_padding = torch.randn(batch, length, generator=generator, dtype=case["dtype"])
    infinite = torch.zeros(batch, length, dtype=case["dtype"]).masked_fill(padded, -math.inf)
    padding = {"": None, "pad-infinite": infinite, "pad-float": float_padding}.get(case["padding"], padded)
    return padding[0] if padding is not None and case["layout"] == "unbatched" else padding


def mask_of(case, rows, keys):
    """(mask, hint); every row keeps a key that no padding hides."""
    generator = torch.Generator().manual_seed(5)
    causal = torch.ones(rows, keys, dtype=torch.bool).triu(1)
    kind = case["mask"]
    if kind in ("causal", "hint"):
        additive = torch.zeros(rows, keys, dtype=case["dtype"]).masked_fill(causal, -math.inf)
        return additive, kind == "hint"
    window = causal | torch.ones(rows, keys, dtype=torch.bool).tril(-4)
    random = torch.rand(rows, keys, generator=generator) > 0.6
    random[:, 0] = False
    if kind == "heads":
        batch = 1 if case["layout"] == "unbatched" else N
        random = torch.rand(batch * H, rows, keys, generator=generator) > 0.6
        random[..., 0] = False
        return random, False
    added = torch.randn(rows, keys, generator=generator, dtype=case["dtype"])
    return {"": None, "window": window, "random": random, "float": added}[kind], False


def compare(ours, theirs, inputs, keywords, dtype, padded=None):
    """Outputs and gradients; rows of `padded` are 0 in ours and count for nothing in theirs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y, expected = ours(*inputs, **keywords), theirs(*inputs, **keywords)
    if padded is not None:
        assert not y[padded].any()
        expected = expected.masked_fill(padded.unsqueeze(-1), 0.0)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    tolerance = dict(atol=1e-8, rtol=1e-8) if dtype == torch.float64 else dict(atol=2e-4, rtol=1e-3)
    assert y.shape == expected.shape and y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, **tolerance)
    needs = [*inputs, *ours.parameters()]
    got = torch.autograd.grad(y, needs, dy)
    for a, e in zip(got, torch.autograd.grad(expected, [*inputs, *theirs.parameters()], dy)):
        torch.testing.assert_close(a, e, **tolerance)


def keywords_of(case, prefix, rows, keys):
    mask, hint = mask_of(case, rows, keys)
    names = {"src": ("src_mask", "src_key_padding_mask", "is_causal")}.get(
        prefix, (f"{prefix}_mask", f"{prefix}_key_padding_mask", f"{prefix}_is_causal")
    )
    return dict(zip(names, (mask, padding_of(case, keys), hint)))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_encoder_layer(case):
    theirs = randomised(torch.nn.TransformerEncoderLayer(**layer_arguments(case)), case)
    ours = fnn.TransformerEncoderLayer.from_torch(theirs)
    compare(ours, theirs, [draw(case, L, 2)], keywords_of(case, "src", L, L), case["dtype"])


@pytest.mark.parametrize("case", CASES[::2], ids=name_of)
def test_decoder(case):
    """A stack of two, so that the layer is tested too; memory has padding and a mask of its own."""
    theirs = torch.nn.TransformerDecoder(
        torch.nn.TransformerDecoderLayer(**layer_arguments(case)),
        2,
        torch.nn.LayerNorm(E, dtype=case["dtype"]),
    )
    ours = fnn.TransformerDecoder.from_torch(randomised(theirs, case))
    memory = dict(case, mask="" if case["mask"] in ("causal", "hint", "window") else case["mask"])
    keywords = keywords_of(case, "tgt", L, L) | keywords_of(memory, "memory", L, S)
    inputs = [draw(case, L, 2), draw(case, S, 7)]
    compare(ours, theirs, inputs, keywords, case["dtype"])
    compare(ours.layers[0], theirs.layers[0], inputs, keywords, case["dtype"])


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_encoder(case):
    if case["dtype"] == torch.float32 and case["training"]:
        case = dict(case, training=False)  # float64 serves for gradients
    layer = torch.nn.TransformerEncoderLayer(**layer_arguments(case))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torch.nn.TransformerEncoder(layer, 2, torch.nn.LayerNorm(E, dtype=case["dtype"]))
    ours = fnn.TransformerEncoder.from_torch(randomised(theirs, case))
    keywords = keywords_of(case, "src", L, L)
    keywords["mask"] = keywords.pop("src_mask")
    padding = keywords["src_key_padding_mask"]
    padded = None
    if case["padding"] in ("pad-right", "pad-holes", "pad-infinite"):
        padded = padding if padding.dtype == torch.bool else padding == -math.inf
        padded = padded.transpose(0, 1) if case["layout"] == "sequence-first" else padded
    x = draw(case, L, 2)
    explanation = ours.explain(x, **keywords)
    ranges = case["mask"] in ("", "causal", "hint", "window")
    packs = padded is not None and case["layout"] != "unbatched" and ranges
    assert explanation.packed == packs
    compare(ours, theirs, [x], keywords, case["dtype"], padded)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_transformer(batch_first, norm_first):
    arguments = dict(dropout=0.0, batch_first=batch_first, norm_first=norm_first, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(5)
        theirs = torch.nn.Transformer(E, H, 2, 2, 32, **arguments)
    torch.manual_seed(5)
    ours = fnn.Transformer(E, H, 2, 2, 32, **arguments)
    assert repr(ours) == repr(theirs)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other) and all(torch.equal(mine[n], other[n]) for n in mine)
    case = dict(layout="batch-first" if batch_first else "sequence-first", dtype=torch.float64)
    src, tgt = draw(case, S, 1), draw(case, L, 2)
    padded = torch.zeros(N, S, dtype=torch.bool)
    padded[1, 5:] = True
    keywords = dict(
        tgt_mask=torch.nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64),
        src_key_padding_mask=padded,
        memory_key_padding_mask=padded,
        tgt_is_causal=True,
    )
    compare(ours, theirs, [src, tgt], keywords, torch.float64)
    shared = fnn.Transformer.from_torch(theirs)
    assert type(shared.encoder.layers[1].norm2) is fnn.LayerNorm
    assert all(a is b for a, b in zip(shared.parameters(), theirs.parameters()))
    with pytest.raises(RuntimeError, match="batch number"):
        ours(src, tgt[:, :1] if not batch_first else tgt[:1])
    with pytest.raises(RuntimeError, match="feature number"):
        ours(src[..., 1:], tgt)
    custom = torch.nn.Identity()
    assert fnn.Transformer(E, H, custom_encoder=custom, num_decoder_layers=1).encoder is custom


def mutant(kind):
    original = multihead.attend

    def attend(q, k, v, seen, *rest, **arguments):
        if kind == "no mask":
            seen = type(seen)()
        elif kind == "heads":
            v = v.roll(1, 1)
        elif kind == "scale":
            arguments["scale"] = 0.9 * q.shape[-1] ** -0.5
        return original(q, k, v, seen, *rest, **arguments)

    return attend


@pytest.mark.parametrize("kind", ["", "no mask", "heads", "scale"])
def test_a_mutant_fails(kind, monkeypatch):
    case = dict(CASES[0], layout="batch-first", padding="pad-right", mask="causal", dtype=torch.float32)
    monkeypatch.setattr(multihead, "attend", mutant(kind))
    if not kind:
        test_encoder(case)
        return
    with pytest.raises(AssertionError, match="not close"):
        test_encoder(case)


def padded_batch(dtype=torch.float32, size=70):
    lengths = torch.tensor([size, size // 3, 1, 0])
    x = torch.randn(4, size, E, dtype=dtype)
    padded = torch.arange(size) >= lengths.unsqueeze(1)
    return x, padded


def small_encoder(dtype=torch.float32, **keywords):
    layer = fnn.TransformerEncoderLayer(E, H, 40, batch_first=True, dtype=dtype, **keywords)
    return fnn.TransformerEncoder(layer, 2, fnn.LayerNorm(E, dtype=dtype))


@pytest.mark.parametrize("training", [True, False])
def test_no_layer_computes_padding(training):
    """Every norm, linear layer and attention is called with the real tokens alone."""
    model = small_encoder(dropout=0.0).train(training)
    x, padded = padded_batch()
    rows = []
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.LayerNorm, torch.nn.MultiheadAttention)):
            module.register_forward_pre_hook(lambda m, args: rows.append(args[0].shape[:-1].numel()))
    y = model(x, src_key_padding_mask=padded)
    assert len(rows) == 2 * 6 + 1 and set(rows) == {int((~padded).sum())}
    assert not y[padded].any() and y[~padded].any(-1).all()


def test_what_padding_holds_reaches_nothing():
    model = small_encoder(dropout=0.0)
    x, padded = padded_batch()
    clean = model(x, src_key_padding_mask=padded)
    poisoned = x.masked_fill(padded.unsqueeze(-1), math.nan).requires_grad_()
    y = model(poisoned, src_key_padding_mask=padded)
    assert torch.equal(y, clean)
    y.square().sum().backward()
    assert all(t.grad.isfinite().all() for t in (poisoned, *model.parameters()))
    assert not poisoned.grad[padded].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["all padded", "right", "left", "one token", "causal"])
def test_no_nan_whatever_the_padding(kind, dtype):
    model = small_encoder(dtype)
    x = torch.randn(4, 10, E, dtype=dtype, requires_grad=True)
    padded = torch.ones(4, 10, dtype=torch.bool)
    mask = None
    if kind in ("right", "left", "causal"):
        padded[0] = False
        padded[1, :4] = False
        padded = padded.flip(1) if kind == "left" else padded
    if kind == "one token":
        padded[2, 3] = False
    if kind == "causal":
        padded[1] = ~padded[1]  # the first rows see no key at all
        mask = torch.ones(10, 10, dtype=torch.bool).triu(1)
    x.data[padded] = math.nan
    for training in (True, False):
        for packed in (True, False):
            model.enable_nested_tensor = packed
            y = model.train(training)(x, mask=mask, src_key_padding_mask=padded)
            assert y.isfinite().all() and not y[padded].any()
            model.zero_grad()
            y.float().square().sum().backward()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            assert all(g.isfinite().all() for g in (x.grad, *grads))
            with torch.no_grad():
                assert model(x, mask=mask, src_key_padding_mask=padded).isfinite().all()


def test_packed_is_unpacked_in_bits_of_float64():
    model = small_encoder(torch.float64, dropout=0.0)
    x, padded = padded_batch(torch.float64)
    packed = model(x, src_key_padding_mask=padded)
    model.enable_nested_tensor = False
    torch.testing.assert_close(packed, model(x, src_key_padding_mask=padded), atol=1e-12, rtol=1e-12)
    assert "enable_nested_tensor" in model.explain(x, src_key_padding_mask=padded).reason


def test_masks_that_pack_and_those_that_do_not():
    model = small_encoder(dropout=0.0)
    x, padded = padded_batch(size=40)
    chunks = masks.Causal() & masks.Chunked(16)
    dense = ~chunks.to_dense(40, 40)[0, 0]
    for mask, packs in (
        (masks.SlidingWindow(5, 2), True),
        (chunks, True),
        (dense, True),
        (masks.Strided(3), False),
        (masks.KeyPadding([40, 30, 20, 10]), True),
        (torch.randn(40, 40), False),
    ):
        explanation = model.explain(x, mask, padded)
        assert explanation.packed == packs, mask
        assert ("tokens are computed" in str(explanation)) == packs
        y = model(x, mask, padded)
        model.enable_nested_tensor = False
        expected = model(x, mask, padded)
        model.enable_nested_tensor = True
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)
    assert "one range" in model.explain(x, masks.Strided(3), padded).reason
    assert "adds to the scores" in model.explain(x, torch.randn(40, 40), padded).reason
    assert model.explain(x).reason == "there is no src_key_padding_mask"


def with_layers(layers):
    model = fnn.TransformerEncoder(layers[0], 1)
    model.layers = torch.nn.ModuleList(layers)
    return model


def test_padded_rows_are_0_however_the_layers_run():
    layer = dict(d_model=E, dim_feedforward=40, dropout=0.0, batch_first=True)
    different = [fnn.TransformerEncoderLayer(nhead=heads, **layer) for heads in (H, 2 * H)]
    theirs = torch.nn.TransformerEncoderLayer(nhead=H, **layer)
    x, padded = padded_batch(size=40)
    infinite = torch.zeros(padded.shape).masked_fill(padded, -math.inf)
    for layers in (different, [theirs], [different[0]]):
        model = with_layers(layers)
        for mask in (None, masks.Strided(3)) if layers[0] is not theirs and len(layers) == 1 else (None,):
            y = model(x, mask, padded)
            torch.testing.assert_close(model(x, mask, infinite), y)
            assert not y[padded].any() and y[~padded].any(-1).all()
    assert "differ in nhead" in with_layers(different).explain(x, None, padded).reason


@pytest.mark.parametrize("training", [True, False])
def test_a_causal_hint_beside_padding_is_no_more_than_a_hint(training):
    model = small_encoder(dropout=0.0).train(training)
    x, padded = padded_batch(size=40)
    window = torch.ones(40, 40, dtype=torch.bool).tril(3).logical_not()
    assert torch.equal(model(x, window, padded, is_causal=True), model(x, window, padded))
    assert (
        model.explain(x, window, padded, True).attention.mask
        == model.explain(x, window, padded).attention.mask
    )
    assert not torch.allclose(model(x, window, padded), model(x, masks.Causal(), padded))


def test_layers_of_another_class_get_plain_masks():
    class Spy(torch.nn.TransformerEncoderLayer):
        def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
            assert src_key_padding_mask.dtype == torch.bool
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)

    x, padded = padded_batch(size=8)
    model = fnn.TransformerEncoder(Spy(E, H, 40, batch_first=True), 2)
    assert model(x, src_key_padding_mask=padded).shape == x.shape
    assert "none of fastattn.nn" in str(model.explain(x, src_key_padding_mask=padded))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested(layout):
    model = small_encoder(dropout=0.0)
    parts = [torch.randn(n, E, requires_grad=True) for n in (3, 7, 1)]
    for module in (model, model.layers[0]):
        x = torch.nested.as_nested_tensor(parts, layout=layout)
        y = module(x)
        assert y.is_nested and y.layout == layout
        expected = [module(part.unsqueeze(0)).squeeze(0) for part in parts]
        for a, e in zip(y.unbind(), expected):
            torch.testing.assert_close(a, e, atol=1e-5, rtol=1e-4)
        grads = torch.autograd.grad(sum(t.square().sum() for t in y.unbind()), parts)
        for a, e in zip(grads, torch.autograd.grad(sum(t.square().sum() for t in expected), parts)):
            torch.testing.assert_close(a, e, atol=1e-4, rtol=1e-3)
        with pytest.raises(AssertionError, match="nested src"):
            module(x, src_key_padding_mask=torch.zeros(3, 7, dtype=torch.bool))


def test_future_tokens_do_not_reach_the_past():
    model = small_encoder(dropout=0.0)
    x, padded = padded_batch(size=30)
    padded[3, :9] = False
    mask = torch.nn.Transformer.generate_square_subsequent_mask(30)
    before = model(x, mask, padded.float().masked_fill(padded, -math.inf))
    x = x.clone()
    x[:, 7] += 1.0
    after = model(x, mask, padded.float().masked_fill(padded, -math.inf))
    assert torch.equal(before[:, :7], after[:, :7]) and not torch.equal(before[0, 7:], after[0, 7:])


BAD_CALLS = {
    "padding's dtype": dict(src_key_padding_mask=torch.zeros(4, 10, dtype=torch.int)),
    "padding's batch": dict(src_key_padding_mask=torch.zeros(3, 10, dtype=torch.bool)),
    "padding's keys": dict(src_key_padding_mask=torch.zeros(4, 9, dtype=torch.bool)),
    "padding's rank": dict(src_key_padding_mask=torch.zeros(10, dtype=torch.bool)),
    "mask's rank": dict(mask=torch.zeros(10, dtype=torch.bool)),
    "mask's dtype": dict(mask=torch.zeros(10, 10, dtype=torch.int)),
    "mask's size": dict(mask=torch.zeros(10, 9, dtype=torch.bool)),
    "mask's heads": dict(mask=torch.zeros(4, 10, 10, dtype=torch.bool)),
    "causal without mask": dict(is_causal=True),
}


@pytest.mark.parametrize("keywords", BAD_CALLS.values(), ids=BAD_CALLS)
def test_refuses_what_torch_refuses(keywords):
    theirs = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(E, H, 40, batch_first=True), 1)
    ours = fnn.TransformerEncoder.from_torch(theirs)
    x = torch.randn(4, 10, E)
    with pytest.raises(Exception) as refused:
        theirs(x, **keywords)
    with pytest.raises(refused.type):
        ours(x, **keywords)
    with pytest.raises(AssertionError):
        ours(x[0], src_key_padding_mask=torch.zeros(1, 10, dtype=torch.bool))
    if "mask" in keywords:
        keywords = {**keywords, "src_key_padding_mask": torch.ones(4, 10, dtype=torch.bool).tril(6)}
        with pytest.raises((AssertionError, RuntimeError)):
            ours(x, **keywords)


def test_constructors_refuse_what_torch_refuses():
    for namespace in (torch.nn, fnn):
        with pytest.raises(RuntimeError, match="activation should be relu/gelu, not tanh"):
            namespace.TransformerEncoderLayer(E, H, activation="tanh")
        with pytest.raises(AssertionError, match="divisible"):
            namespace.TransformerDecoderLayer(E, 5)


def test_copies_pickles_and_replaced_children():
    model = small_encoder().eval()
    x, padded = padded_batch(size=8)
    expected = model(x, src_key_padding_mask=padded)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied.layers[0]) is fnn.TransformerEncoderLayer
        assert torch.equal(copied(x, src_key_padding_mask=padded), expected)
    # torch's fused path would pass by a replaced norm; here every child is called.
    model.layers[0].norm1 = torch.nn.Identity()
    with torch.no_grad():
        assert not torch.equal(model(x, src_key_padding_mask=padded), expected)


def test_dropout_draws_in_training_only():
    model = small_encoder(dropout=0.3)
    x, padded = padded_batch(size=12)
    assert not torch.equal(model(x, src_key_padding_mask=padded), model(x, src_key_padding_mask=padded))
    torch.manual_seed(1)
    a = model(x, src_key_padding_mask=padded)
    torch.manual_seed(1)
    assert torch.equal(model(x, src_key_padding_mask=padded), a)
    model.eval()
    assert torch.equal(model(x, src_key_padding_mask=padded), model(x, src_key_padding_mask=padded))


def test_plan_of_any_padding():
    """The packed rows are the real tokens in order, and each sees its own item's."""
    padded = torch.rand(3, 50, generator=torch.Generator().manual_seed(0)) > 0.5
    for batch_first, lead in ((True, (3, 50)), (False, (50, 3))):
        plan = packing.plan(padded, masks.Causal(), 2, batch_first, lead)
        places = (~padded).nonzero()
        numbers = torch.arange(150).view(3, 50)
        x = numbers if batch_first else numbers.t()
        assert torch.equal(plan.pack(x.unsqueeze(-1)).flatten(), numbers[~padded])
        item, place = places.unbind(1)
        seen = plan.seen.mask.lowered.to_dense()[0]
        expected = (item[:, None] == item) & (place <= place[:, None])
        assert torch.equal(seen, expected.expand(2, -1, -1))
    assert encoder.sequence_sizes(torch.zeros(5, 3, 2), False) == (3, 5)


def test_nested_over_layers_that_do_not_share_their_masks():
    """torch's layers take a nested tensor where they take one with torch's encoder, ours of any nhead always."""
    layer = dict(d_model=E, dim_feedforward=40, dropout=0.0, batch_first=True)
    parts = [torch.randn(n, E) for n in (3, 7, 1)]
    x = torch.nested.as_nested_tensor(parts)
    theirs = torch.nn.TransformerEncoderLayer(nhead=H, **layer)
    different = [fnn.TransformerEncoderLayer(nhead=heads, **layer) for heads in (H, 2 * H)]
    for layers in ([theirs], different, []):
        model = with_layers(layers or [theirs]).eval()
        if not layers:
            model.layers = torch.nn.ModuleList()
        with torch.no_grad():
            for y, part in zip(model(x).unbind(), parts):
                torch.testing.assert_close(y, model(part.unsqueeze(0)).squeeze(0), atol=1e-5, rtol=1e-4)
    with pytest.raises(AssertionError, match="does not support NestedTensor outside of its fast path"):
        with_layers([theirs]).train()(x)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_decoders_refuse_nested_tensors_by_name(layout):
    """torch's refuse them too, as AssertionError."""
    nested = torch.nested.as_nested_tensor([torch.randn(n, E) for n in (3, 7)], layout=layout)
    dense = torch.randn(2, 7, E)
    for namespace in (torch.nn, fnn):
        layer = namespace.TransformerDecoderLayer(E, H, 40, batch_first=True)
        for module in (layer, namespace.TransformerDecoder(layer, 1)):
            for tgt, memory, name in ((nested, nested, "tgt"), (dense, nested, "memory")):
                match = f"takes no nested tensors, got a nested {name}" if namespace is fnn else None
                with pytest.raises(AssertionError, match=match):
                    module(tgt, memory)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_explain_of_nested_tensors(layout):
    model = small_encoder(dropout=0.0)
    x = torch.nested.as_nested_tensor([torch.randn(n, E) for n in (3, 7)], layout=layout)
    explanation = model.explain(x)
    assert explanation.packed and "nested" in explanation.reason and explanation.attention.kernel == "cpu"
    assert "Sq=10" in str(explanation) and "a range of keys a row" in explanation.attention.mask
