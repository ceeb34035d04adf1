"""fastattn.nn.MultiheadAttention against torch.nn's: arguments, results, gradients, errors."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from pairwise import name_of, pairwise

import fastattn
from fastattn import masks
from fastattn.nn import MultiheadAttention, TransformerEncoderLayer, multihead
from fastattn.nn.masking import Visibility

E, H, N, L, S = 24, 3, 2, 7, 9

FACTORS = dict(
    layout=("batch-first", "sequence-first", "unbatched"),
    inputs=("self", "memory", "apart"),
    bias=(True, False),
    add_bias_kv=(False, True),
    add_zero_attn=(False, True),
    widths=("one", "three"),
    padding=("", "pad-bool", "pad-infinite", "pad-float"),
    mask=("", "bool2", "float2", "bool3", "float3", "infinite2", "causal"),
    need_weights=(True, False),
    average=(True, False),
    training=(True, False),
    dtype=(torch.float64, torch.float32),
)
CASES = pairwise(**FACTORS)
EVERY = [dict(case, inputs=i, dtype=d) for case in CASES for i in FACTORS["inputs"] for d in FACTORS["dtype"]]


def module_of(case, cls=torch.nn.MultiheadAttention):
    torch.manual_seed(1)
    module = cls(
        E,
        H,
        bias=case["bias"],
        add_bias_kv=case["add_bias_kv"],
        add_zero_attn=case["add_zero_attn"],
        kdim=None if case["widths"] == "one" else 10,
        vdim=None if case["widths"] == "one" else 14,
        batch_first=case["layout"] == "batch-first",
        dtype=case["dtype"],
    )
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return module.train(case["training"])


def call_of(case):
    """Inputs and keywords; masks leave every row a key."""
    generator = torch.Generator().manual_seed(2)
    k_width, v_width = (E, E) if case["widths"] == "one" else (10, 14)
    same = case["inputs"] == "self" and case["widths"] == "one"
    keys = L if same or case["mask"] == "causal" else S

    def draw(length, width):
        shape = {"batch-first": (N, length, width), "sequence-first": (length, N, width)}
        x = torch.randn(shape.get(case["layout"], (length, width)), generator=generator, dtype=torch.float64)
        return x.to(case["dtype"]).requires_grad_()

    query = draw(L, E)
    if same:
        key = value = query
    else:
        key = draw(keys, k_width)
        value = key if case["inputs"] == "memory" and k_width == v_width else draw(keys, v_width)
    batch = 1 if case["layout"] == "unbatched" else N
    keywords = {"need_weights": case["need_weights"], "average_attn_weights": case["average"]}
    if case["padding"]:
        padding = torch.zeros(batch, keys, dtype=torch.bool)
        padding[-1, 5:] = True
        if case["padding"] == "pad-infinite":
            padding = torch.zeros(batch, keys, dtype=case["dtype"]).masked_fill(padding, -math.inf)
        elif case["padding"] == "pad-float":
            padding = torch.randn(batch, keys, generator=generator, dtype=case["dtype"])
        keywords["key_padding_mask"] = padding[0] if case["layout"] == "unbatched" else padding
    kind = case["mask"]
    if kind == "causal":
        keywords |= {"attn_mask": torch.ones(L, L, dtype=torch.bool).triu(1), "is_causal": True}
    elif kind:
        shape = (L, keys) if kind.endswith("2") else (batch * H, L, keys)
        mask = torch.rand(shape, generator=generator) > 0.6
        mask[..., 0] = False
        if kind.startswith("float"):
            mask = torch.randn(shape, generator=generator, dtype=case["dtype"])
        elif kind.startswith("infinite"):
            mask = torch.zeros(shape, dtype=case["dtype"]).masked_fill(mask, -math.inf)
        keywords["attn_mask"] = mask
    return (query, key, value), keywords


def run(module, inputs, keywords):
    """Outputs, weights and the gradients of inputs and parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out, weights = module(*inputs, **keywords)
    results = [out] if weights is None else [out, weights]
    generator = torch.Generator().manual_seed(3)
    douts = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.dtype) for r in results]
    needs = [*dict.fromkeys(inputs), *module.parameters()]
    grads = torch.autograd.grad(results, needs, douts, allow_unused=True)
    return [*results, *grads]


def check(case):
    theirs = module_of(case)
    ours = MultiheadAttention.from_torch(theirs)
    inputs, keywords = call_of(case)
    compare(run(ours, inputs, keywords), run(theirs, inputs, keywords), case["dtype"])


def compare(actual, expected, dtype):
    tolerance = dict(atol=1e-9, rtol=1e-9) if dtype == torch.float64 else dict(atol=3e-5, rtol=1e-4)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected):
        if a is None or e is None:
            # A gradient of exactly 0 may be told apart or not.
            assert all(t is None or not t.any() for t in (a, e))
            continue
        assert a.dtype == e.dtype and a.shape == e.shape
        torch.testing.assert_close(a, e, **tolerance)


def without_extra_keys(case):
    """torch's causal flag hides the keys that bias_kv and zero_attn add, its mask does not; see docs/modules.md."""
    if case["mask"] == "causal" and case["widths"] == "three":
        case = dict(case, widths="one")
    hint = case["mask"] == "causal" and not case["need_weights"] and not case["padding"]
    return dict(case, add_bias_kv=False, add_zero_attn=False) if hint else case


@pytest.mark.parametrize("case", [*map(without_extra_keys, CASES)], ids=name_of)
def test_like_torch(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*map(without_extra_keys, EVERY)], ids=name_of)
def test_like_torch_all_inputs(case):
    check(case)


PLAIN = dict(
    layout="batch-first",
    inputs="memory",
    bias=True,
    add_bias_kv=False,
    add_zero_attn=False,
    widths="one",
    padding="pad-bool",
    mask="bool3",
    need_weights=True,
    average=True,
    training=False,
    dtype=torch.float32,
)


def mutant(kind):
    def attend(q, k, v, seen, dropout_p=0.0, **arguments):
        if kind == "no mask":
            seen = Visibility()
        elif kind == "no padding":
            seen = Visibility(seen.mask.masks[1])
        elif kind == "flipped":
            seen = Visibility(~seen.mask)
        elif kind == "heads":
            k, v = k.flip(1), v.flip(1)
        elif kind == "scale":
            arguments["scale"] = 1.05 * q.shape[-1] ** -0.5
        return fastattn.attention(q, k, v, **seen.arguments(), **arguments)

    return attend


@pytest.mark.parametrize("kind", ["", "no mask", "no padding", "flipped", "heads", "scale"])
def test_a_mutant_fails(kind, monkeypatch):
    monkeypatch.setattr(multihead, "attend", mutant(kind))
    if not kind:
        check(PLAIN)
        return
    with pytest.raises(AssertionError, match="not close|Tensor-likes"):
        check(PLAIN)


BAD_CALLS = {
    "rank of query": lambda m: m(torch.randn(1, 2, 3, E), torch.randn(2, 3, E), torch.randn(2, 3, E)),
    "rank of key": lambda m: m(torch.randn(2, 3, E), torch.randn(3, E), torch.randn(3, E)),
    "rank of padding": lambda m: self_call(m, key_padding_mask=torch.zeros(3, dtype=torch.bool)),
    "padding's batch": lambda m: self_call(m, key_padding_mask=torch.zeros(3, 3, dtype=torch.bool)),
    "padding's keys": lambda m: self_call(m, key_padding_mask=torch.zeros(2, 4, dtype=torch.bool)),
    "padding's dtype": lambda m: self_call(m, key_padding_mask=torch.zeros(2, 3, dtype=torch.int)),
    "rank of mask": lambda m: self_call(m, attn_mask=torch.zeros(3, dtype=torch.bool)),
    "mask's size": lambda m: self_call(m, attn_mask=torch.zeros(3, 4, dtype=torch.bool)),
    "mask's heads": lambda m: self_call(m, attn_mask=torch.zeros(2, 3, 3, dtype=torch.bool)),
    "mask's dtype": lambda m: self_call(m, attn_mask=torch.zeros(3, 3, dtype=torch.int)),
    "unbatched mask": lambda m: m(*[torch.randn(3, E)] * 3, attn_mask=torch.zeros(2, 3, 3, dtype=torch.bool)),
    "causal without mask": lambda m: self_call(m, is_causal=True),
    "width": lambda m: m(*[torch.randn(2, 3, E + 1)] * 3),
    "key and value": lambda m: m(torch.randn(2, 3, E), torch.randn(2, 4, E), torch.randn(2, 5, E)),
    "batch of key": lambda m: m(torch.randn(2, 3, E), *[torch.randn(4, 3, E)] * 2),
    "dtype of query": lambda m: m(*[torch.randn(2, 3, E, dtype=torch.float64)] * 3),
    "nested and padding": lambda m: m(*[nested()] * 3, key_padding_mask=torch.zeros(2, 3, dtype=torch.bool)),
}


def self_call(m, **keywords):
    x = torch.randn(2, 3, E)
    return m(x, x, x, **keywords)


def nested(requires_grad=False, layout=torch.strided):
    parts = [torch.randn(n, E, requires_grad=requires_grad) for n in (3, 5)]
    return torch.nested.as_nested_tensor(parts, layout=layout)


@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS)
def test_refuses_what_torch_refuses(call):
    theirs = torch.nn.MultiheadAttention(E, H, batch_first=True)
    with pytest.raises(Exception) as refused:
        call(theirs)
    with pytest.raises(refused.type):
        call(MultiheadAttention.from_torch(theirs))


@pytest.mark.parametrize("arguments", [(0, 1), (8, 0), (8, 3)])
def test_constructor_refuses_what_torch_refuses(arguments):
    with pytest.raises(Exception) as refused:
        torch.nn.MultiheadAttention(*arguments)
    with pytest.raises(refused.type, match="embed_dim"):
        MultiheadAttention(*arguments)


@pytest.mark.parametrize("widths", ["one", "three"])
@pytest.mark.parametrize("bias", [True, False])
def test_constructor_state_and_pickle(widths, bias):
    sizes = {} if widths == "one" else {"kdim": 10, "vdim": 14}
    keywords = dict(dropout=0.1, bias=bias, add_bias_kv=True, add_zero_attn=True, batch_first=True, **sizes)
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(E, H, **keywords)
    torch.manual_seed(0)
    ours = MultiheadAttention(E, H, **keywords)
    assert repr(ours) == repr(theirs) and isinstance(ours, torch.nn.MultiheadAttention)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other) and all(torch.equal(mine[n], other[n]) for n in mine)
    theirs.load_state_dict(mine)
    ours.load_state_dict(theirs.state_dict())
    public = {n for n in vars(theirs) if n not in ("_parameters", "_modules")}
    assert all(vars(ours)[n] == vars(theirs)[n] for n in public)
    query, key, value = torch.randn(2, 3, E), torch.randn(2, 4, ours.kdim), torch.randn(2, 4, ours.vdim)
    for copied in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert type(copied) is MultiheadAttention
        out = copied.eval()(query, key, value)[0]
        torch.testing.assert_close(out, ours.eval()(query, key, value)[0])


def test_from_torch_shares_parameters_and_hooks():
    theirs = torch.nn.MultiheadAttention(E, H)
    seen = []
    theirs.register_forward_hook(lambda *_: seen.append(1))
    ours = MultiheadAttention.from_torch(theirs)
    assert all(a is b for a, b in zip(ours.parameters(), theirs.parameters()))
    self_call(ours)
    assert seen == [1]
    ours.register_buffer("mine", torch.zeros(1))
    assert not hasattr(theirs, "mine")
    with pytest.raises(TypeError, match="must be a torch.nn.MultiheadAttention"):
        MultiheadAttention.from_torch(torch.nn.Linear(2, 2))

    class Other(torch.nn.MultiheadAttention):
        def forward(self, x):
            return x

    with pytest.raises(TypeError, match="forward of its own"):
        MultiheadAttention.from_torch(Other(E, H))

    class Experts(torch.nn.TransformerEncoderLayer):
        def _ff_block(self, x):
            return x

    with pytest.raises(TypeError, match="_ff_block of its own"):
        TransformerEncoderLayer.from_torch(Experts(E, H))


@pytest.mark.parametrize("need_weights", [True, False])
def test_rows_that_see_nothing(need_weights):
    """Where torch gives NaN, in outputs or in gradients (pytorch #41508): 0 here."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        module = MultiheadAttention(E, H, batch_first=True, dtype=dtype)
        x = torch.randn(3, 5, E, dtype=dtype, requires_grad=True)
        padding = torch.zeros(3, 5, dtype=torch.bool)
        padding[1] = True
        padding[2, 2:] = True
        mask = torch.zeros(5, 5, dtype=torch.bool)
        mask[3] = True
        out, weights = module(x, x, x, key_padding_mask=padding, attn_mask=mask, need_weights=need_weights)
        assert torch.equal(out[1], module.out_proj.bias.expand(5, E))
        assert torch.equal(out[:, 3], module.out_proj.bias.expand(3, E))
        if need_weights:
            assert not weights[1].any() and not weights[:, 3].any() and weights[0, 0].any()
            (out.sum() + weights.square().sum()).backward()
        else:
            out.square().sum().backward()
        assert all(t.grad.isfinite().all() for t in (x, *module.parameters()))


def test_what_padding_holds_reaches_nothing():
    module = MultiheadAttention(E, H, batch_first=True)
    query, memory = torch.randn(2, 4, E), torch.randn(2, 6, E)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[:, 4:] = True
    clean = module(query, memory, memory, key_padding_mask=padding)
    memory[:, 4:] = math.nan
    for a, b in zip(clean, module(query, memory, memory, key_padding_mask=padding)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mask", [None, masks.Causal(), masks.SlidingWindow(2, 3), masks.Strided(3)])
@pytest.mark.parametrize("length", [6, 4])
def test_padded_keys_are_not_projected(mask, length):
    module = MultiheadAttention(E, H, batch_first=True)
    memory = torch.randn(3, 6, E)
    query = memory if length == 6 else torch.randn(3, 4, E)
    padding = torch.tensor([[0, 0, 0, 0, 0, 0], [1, 0, 0, 1, 0, 1], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    poisoned = memory.masked_fill(padding.unsqueeze(-1), math.nan)
    poisoned = poisoned if length == 4 else memory.clone()
    rows = query if length == 4 else poisoned
    out, _ = module(rows, poisoned, poisoned, key_padding_mask=padding, attn_mask=mask, need_weights=False)
    seen = (
        ~padding[:, None, None] if mask is None else ~padding[:, None, None] & mask.to_dense(length, 6, 3, H)
    )
    hidden = ~seen.expand(3, H, length, 6).flatten(0, 1)
    expected, _ = module(query, memory, memory, attn_mask=hidden, need_weights=False)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    needs = list(module.parameters())
    dy = torch.randn_like(out)
    for a, e in zip(torch.autograd.grad(out, needs, dy), torch.autograd.grad(expected, needs, dy)):
        if length == 6 or mask is None or type(mask) is not masks.Strided:
            torch.testing.assert_close(a, e, atol=1e-5, rtol=1e-4)


def test_lowest_finite_mask():
    """finfo.min hides next to other keys, and is a uniform row alone (pytorch #109517)."""
    module = MultiheadAttention(E, H, batch_first=True)
    theirs = torch.nn.MultiheadAttention(E, H, batch_first=True)
    theirs.load_state_dict(module.state_dict())
    x = torch.randn(2, 5, E)
    mask = torch.zeros(5, 5)
    mask[:, 3:] = mask[2] = torch.finfo(torch.float32).min
    for a, b in zip(module(x, x, x, attn_mask=mask), theirs(x, x, x, attn_mask=mask)):
        torch.testing.assert_close(a, b)


def test_weights_are_those_of_the_output():
    """In training they are after dropout, as torch's: the output is their product with the values."""
    module = MultiheadAttention(E, H, dropout=0.5, batch_first=True)
    x = torch.randn(2, 40, E)
    out, weights = module(x, x, x, average_attn_weights=False)
    v = torch.nn.functional.linear(x, module.in_proj_weight[2 * E :], module.in_proj_bias[2 * E :])
    v = v.unflatten(-1, (H, -1)).transpose(1, 2)
    expected = module.out_proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected)
    dropped = (weights == 0).float().mean()
    assert 0.4 < dropped < 0.6
    mean = module.eval()(x, x, x)[1]
    torch.testing.assert_close(mean, module(x, x, x, average_attn_weights=False)[1].mean(1))


def test_masks_of_the_algebra():
    module = MultiheadAttention(E, H, batch_first=True)
    x = torch.randn(2, 9, E)
    hidden = ~masks.SlidingWindow(3, 0).to_dense(9, 9)[0, 0]
    expected = module(x, x, x, attn_mask=hidden)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = True
    window = masks.SlidingWindow(3, 0)
    for a, b in zip(module(x, x, x, attn_mask=window), expected):
        torch.testing.assert_close(a, b)
    both = module(x, x, x, attn_mask=window, key_padding_mask=padding)
    for a, b in zip(both, module(x, x, x, attn_mask=hidden, key_padding_mask=padding)):
        torch.testing.assert_close(a, b)
    extra = MultiheadAttention(E, H, batch_first=True, add_zero_attn=True, add_bias_kv=True)
    for a, b in zip(extra(x, x, x, attn_mask=window), extra(x, x, x, attn_mask=hidden)):
        torch.testing.assert_close(a, b)
    q = x.unflatten(-1, (H, -1)).transpose(1, 2)
    with pytest.raises(TypeError, match="prepared"):
        module(x, x, x, attn_mask=window.prepare(q, q), key_padding_mask=padding)
    with pytest.raises(TypeError, match="attn_mask must be"):
        module(x, x, x, attn_mask="causal")


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested(layout):
    module = MultiheadAttention(E, H, batch_first=True)
    parts = [torch.randn(n, E, requires_grad=True) for n in (3, 5, 1)]
    x = torch.nested.as_nested_tensor(parts, layout=layout)
    out, weights = module(x, x, x, need_weights=False)
    assert out.is_nested and out.layout == layout and weights is None
    for a, part in zip(out.unbind(), parts):
        torch.testing.assert_close(a, module(part, part, part)[0])
    grads = torch.autograd.grad(sum(t.square().sum() for t in out.unbind()), parts)
    expected = torch.autograd.grad(sum(module(t, t, t)[0].square().sum() for t in parts), parts)
    for a, b in zip(grads, expected):
        torch.testing.assert_close(a, b)
    if layout == torch.strided:
        with torch.no_grad():
            theirs = torch.nn.MultiheadAttention(30, 2, batch_first=True).eval()
            ours = MultiheadAttention.from_torch(theirs)
            y = torch.nested.nested_tensor([torch.randn(n, 30) for n in (3, 5)])
            for a, b in zip(
                ours(y, y, y, need_weights=False)[0].unbind(), theirs(y, y, y, need_weights=False)[0].unbind()
            ):
                torch.testing.assert_close(a, b)


def test_explain():
    module = MultiheadAttention(E, H, batch_first=True)
    x = torch.randn(2, 9, E)
    mask = torch.ones(9, 9, dtype=torch.bool).triu(1)
    assert module.explain(x, x, x, attn_mask=mask, is_causal=True).kernel == "cpu"
    assert "band" in module.explain(x, x, x, attn_mask=mask, is_causal=True).mask
    assert module.double().explain(x.double(), x.double(), x.double()).kernel == "reference"


def test_mismatched_masks_warn_as_torch():
    x = torch.randn(2, 5, E)
    arguments = dict(key_padding_mask=torch.zeros(2, 5, dtype=torch.bool), attn_mask=torch.zeros(5, 5))
    for cls in (torch.nn.MultiheadAttention, MultiheadAttention):
        with pytest.warns(UserWarning, match="mismatched key_padding_mask and attn_mask"):
            cls(E, H, batch_first=True)(x, x, x, **arguments)


@pytest.mark.parametrize("kind", ["ranges", "bits", "bias"])
def test_weights_slab_by_slab(kind):
    """`AttentionWeights` gives any rows without the others, for every form of a mask."""
    from fastattn.weights import AttentionWeights

    q, k = torch.randn(2, 4, 150, 16), torch.randn(2, 2, 200, 16)
    mask = masks.CausalLowerRight() & masks.KeyPadding([200, 130])
    arguments = {"mask": mask if kind == "ranges" else mask & masks.Strided(7), "softcap": 5.0}
    if kind == "bias":
        arguments |= {
            "bias": torch.randn(1, 4, 150, 200),
            "sinks": torch.randn(4),
            "alibi_slopes": torch.rand(4),
        }
    weights = AttentionWeights(q, k, **arguments)
    expected = fastattn.attention(q, k, k, return_weights=True, **arguments)[1]
    torch.testing.assert_close(weights.all(), expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(weights.mean(), expected.mean(1), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(
        weights.rows(70, 131, slice(1, 3)), expected[:, 1:3, 70:131], atol=2e-6, rtol=1e-5
    )
    slabs = torch.cat([slab for _, slab in weights.slabs()], 2)
    torch.testing.assert_close(slabs, expected, atol=2e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="rows"):
        weights.rows(0, 151)


def test_a_wrong_width_is_named():
    module = MultiheadAttention(E, H, kdim=6, vdim=5)
    query, key, value = (torch.randn(3, width) for width in (E, 6, 5))
    with pytest.raises(AssertionError, match="key dimension of 6, but got 7"):
        module(query, torch.randn(3, 7), value)
    with pytest.raises(AssertionError, match="value dimension of 5, but got 4"):
        module(query, key, torch.randn(3, 4))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("shape", ["[L, S]", "[N * H, L, S]", "[N, S]", "both"])
def test_gradients_of_masks(shape, need_weights):
    """A learned bias given as a mask, and learned padding."""
    theirs = torch.nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64)
    ours = MultiheadAttention.from_torch(theirs)
    query, memory = (torch.randn(N, n, E, dtype=torch.float64, requires_grad=True) for n in (L, S))
    lead = (N * H,) if shape == "[N * H, L, S]" else ()
    terms = {"attn_mask": torch.randn(*lead, L, S), "key_padding_mask": torch.randn(N, S)}
    terms = {
        name: term.double().requires_grad_()
        for name, term in terms.items()
        if shape == "both" or (name == "key_padding_mask") == (shape == "[N, S]")
    }
    results = [m(query, memory, memory, need_weights=need_weights, **terms) for m in (ours, theirs)]
    needs = [*terms.values(), query, memory, *theirs.parameters()]
    grads = [
        torch.autograd.grad(sum(r.square().sum() for r in result if r is not None), needs)
        for result in results
    ]
    for a, e in zip(*grads):
        assert e.any()
        torch.testing.assert_close(a, e, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["", "causal", "heads", "float", "window", "padding"])
def test_weights_change_nothing_of_the_output(kind, training, monkeypatch):
    """The output of need_weights=True comes from the same call of the same kernel."""
    calls = []
    attend = multihead.attend

    def spy(q, k, v, seen, *rest, **arguments):
        calls.append(fastattn.explain(q, k, v, **seen.arguments()))
        return attend(q, k, v, seen, *rest, **arguments)

    monkeypatch.setattr(multihead, "attend", spy)
    module = MultiheadAttention(E, H, batch_first=True).train(training)
    x = torch.randn(N, L, E)
    mask = torch.rand(N * H, L, L) > 0.7
    keywords = {
        "": {},
        "causal": {"attn_mask": torch.ones(L, L, dtype=torch.bool).triu(1)},
        "heads": {"attn_mask": mask},
        "float": {"attn_mask": torch.randn(L, L)},
        "window": {"attn_mask": masks.SlidingWindow(2, 0)},
        "padding": {"key_padding_mask": torch.arange(L) >= torch.tensor([[L], [3]])},
    }[kind]
    (with_weights, weights), (without, none) = (
        module(x, x, x, need_weights=need, **keywords) for need in (True, False)
    )
    assert weights.shape == (N, L, L) and none is None
    assert [call.kernel for call in calls] == ["cpu", "cpu"]
    if kind == "padding":  # of real keys alone, without weights: another order of sums
        torch.testing.assert_close(with_weights, without, atol=1e-6, rtol=1e-6)
    else:
        assert torch.equal(with_weights, without)
        assert calls[0].mask == calls[1].mask
