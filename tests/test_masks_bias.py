"""A bias of -inf hides keys, and blocks that it hides whole are not visited."""

import math

import pytest
import torch
from mask_checks import additive, assert_well_formed, bools

import fastattn
from fastattn import masks, reference
from fastattn.masks.lower import lower, narrowed
from fastattn.tools.equivalence import check_visible, error_rule

pytestmark = pytest.mark.usefixtures("one_thread")

S = 200
I, J = torch.arange(S)[:, None], torch.arange(S)
WINDOW = (J <= I) & (J > I - 40)
DOCUMENTS = I // 70 == J // 70


def inputs(dtype=torch.float32, Sk=S, B=2, Hq=4):
    return torch.randn(B, Hq, S, 16).to(dtype), *(torch.randn(B, 2, Sk, 16).to(dtype) for _ in "kv")


def hiding(visible, dtype=torch.float32):
    return torch.randn(visible.shape).to(dtype).masked_fill(~visible, -math.inf)


def granules_seen(visible):
    """[..., n_q, n_k]: the granules of 64 x 64 of which any entry is visible."""
    padded = torch.zeros(*visible.shape[:-2], 256, 256, dtype=torch.bool)
    padded[..., : visible.shape[-2], : visible.shape[-1]] = visible
    return padded.unflatten(-1, (4, 64)).unflatten(-3, (4, 64)).any(-1).any(-2)


FORMS = {
    "matrix": lambda t: t(WINDOW),
    "heads": lambda t: t(torch.stack([WINDOW, DOCUMENTS, (J < 70).expand(S, S), WINDOW.T])),
    "batch": lambda t: t(torch.stack([WINDOW, DOCUMENTS])[:, None]),
    "whole": lambda t: t(torch.stack([WINDOW, DOCUMENTS]).repeat_interleave(4, 0).view(2, 4, S, S)),
    "transposed": lambda t: t(WINDOW).mT,
    "sliced": lambda t: torch.cat([t(DOCUMENTS), t(DOCUMENTS)], 1)[:, 3 : S + 3],
    "every other": lambda t: t(WINDOW.repeat_interleave(2, 1))[:, ::2],
    "expanded": lambda t: t(WINDOW).expand(2, 4, S, S),
    "a row of nothing": lambda t: t(WINDOW & (I != 130)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_what_a_bias_hides_whole_is_not_listed(form, dtype, path):
    bias = FORMS[form](lambda visible: hiding(visible, dtype))
    bias = bias[(None,) * (4 - bias.dim())]
    lowered = narrowed(lower(None, 2, 4, 2, S, S, "cpu"), bias)
    assert_well_formed(lowered)
    visible = (bias != -math.inf).expand(2, 4, S, S)
    assert not (visible & ~lowered.to_dense()).any(), "what the bias shows is shown"
    assert torch.equal(granules_seen(lowered.to_dense()), granules_seen(visible))


def test_the_same_granules_as_for_the_mask():
    """However -inf is written, explain names the granules that are visited: 10 of the 16 here."""
    q, k, v = inputs()
    bias = hiding(I >= J)
    for given in (dict(bias=bias), dict(mask=bias), dict(bias=bias[None]), dict(bias=bias, mask=I >= J)):
        assert "10 granules of 64 x 64" in fastattn.explain(q, k, v, **given).mask, given
    assert fastattn.explain(q, k, v, bias=bias, backend="reference").mask == "none"


def test_a_bias_that_hides_no_granule_costs_a_look_at_their_corners():
    q, k, v = inputs()
    bias = torch.randn(4, S, S)
    assert fastattn.explain(q, k, v, bias=bias).mask == "none"
    inside = bias.index_fill(1, torch.arange(1, 64), -math.inf)
    flags = torch.ops.fastattn.bias_scan(inside[None])[3]
    assert flags & 1, "no corner is hidden, so no granule is, and the rest of the bias is not read"
    assert fastattn.explain(q, k, v, bias=inside).mask == "none"
    wrong = bias.index_fill(1, torch.arange(64), -math.inf)
    assert "48 granules" in fastattn.explain(q, k, v, bias=wrong).mask
    routes = [torch.ops.fastattn.attention_route(rows, 1, 16, 16, 0) for rows in (8, 9)]
    assert routes == ["decode", "attention"]
    few = fastattn.explain(q[:, :, :8], k, v, bias=wrong[:, :8])
    assert few.mask == "none", "the decode kernel reads the bias itself"


def test_a_bias_without_rows_bounds_the_keys():
    q, k, v = inputs()
    keys = hiding((torch.tensor([[70], [131]]) > J) & (J >= 3))[:, None, None]
    assert fastattn.explain(q, k, v, bias=keys).mask == "a range of keys a row"
    gaps = keys.clone()
    gaps[..., 10] = -math.inf
    for bias in (keys, gaps, keys[:1]):
        expected = reference.attention(q.double(), k.double(), v.double(), bias=bias.double())
        assert error_rule(fastattn.attention(q, k, v, bias=bias), expected, None)


MASKS = {
    "none": None,
    "causal": masks.Causal(),
    "padding": masks.KeyPadding([0, 90]),
    "window and padding": masks.SlidingWindow(50, 50) & masks.KeyPadding([70, 199]),
    "bits": masks.Longformer(20, [0, 5]),
    "tensor": bools(2, 1, S, S, share=0.9),
    "additive": additive(bools(2, 4, S, S, share=0.9)) + torch.randn(S),
    "prepared": "prepared",
}


def with_gradients(attend, operands, mask):
    """out, and the gradients of its weighted sum by q, k, v and the bias."""
    leaves = [t.detach().clone().requires_grad_() for t in operands]
    out = attend(*leaves[:3], bias=leaves[3], mask=mask)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    return out, torch.autograd.grad(out, leaves, weights)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("form", ["heads", "batch", "whole"])
def test_bias_and_mask_together(form, mask):
    """The intersection, to the key and under the error rule, with the gradients of everything."""
    q, k, v = inputs()
    bias, mask = FORMS[form](hiding), MASKS[mask]
    if mask == "prepared":
        mask = masks.Causal().prepare(q, k)
    # dense: what the mask shows; summed: the bias with what an additive mask adds; alike: the mask without numbers
    dense, summed, alike = torch.ones(S, S, dtype=torch.bool), bias.double(), mask
    if isinstance(mask, torch.Tensor):
        dense = mask if mask.dtype == torch.bool else mask != -math.inf
        if mask.is_floating_point():
            summed, alike = summed + mask, additive(dense)
    elif mask is not None:
        dense = I >= J if isinstance(mask, masks.Prepared) else mask.to_dense(S, S, 2, 4)
    hidden = torch.where(bias == -math.inf, bias, 0.0)
    verdict = check_visible(
        lambda q, k, v: fastattn.attention(q, k, v, bias=hidden, mask=alike, return_lse=True),
        dense & (hidden == 0),
        2,
        4,
        2,
    )
    assert verdict, str(verdict)
    out, gradients = with_gradients(fastattn.attention, (q, k, v, bias), mask)
    expected, exact = with_gradients(reference.attention, [t.double() for t in (q, k, v, summed)], dense)
    assert error_rule(out, expected, reference.attention(q, k, v, bias=summed.float(), mask=dense))
    theirs = with_gradients(reference.attention, (q, k, v, summed.float()), dense)[1]
    for name, gradient, wanted, other in zip(("q", "k", "v", "bias"), gradients, exact, theirs):
        wanted, other = (t.sum_to_size(gradient.shape) for t in (wanted, other))
        verdict = error_rule(gradient, wanted, other)
        assert verdict, f"d{name}: {verdict.reason}"
    assert (gradients[3][bias == -math.inf] == 0).all()


def test_a_bias_that_changes_is_read_again():
    q, k, v = inputs()
    bias = hiding(WINDOW)
    fastattn.attention(q, k, v, bias=bias)
    bias.masked_fill_(DOCUMENTS, 0.0)
    expected = reference.attention(q.double(), k.double(), v.double(), bias=bias.double())
    assert error_rule(fastattn.attention(q, k, v, bias=bias), expected, None)


def test_what_a_bias_hides_may_hold_nan():
    q, k, v = inputs()
    bias = hiding(WINDOW & (J != 20) & (J < 128))
    clean = fastattn.attention(q, k, v, bias=bias)
    for at in (20, slice(128, None)):
        k[:, :, at] = v[:, :, at] = math.nan
    assert torch.equal(fastattn.attention(q, k, v, bias=bias), clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_alone_and_beside_a_bias_that_hides_more(isa, dtype):
    """Item 0 alone has no granule to skip, and takes no lists at all."""
    q, k, v = inputs(dtype)
    plain = torch.randn(S, S).masked_fill(bools(S, S, share=0.1) & (I % 64 > 0), -math.inf)
    bias = torch.stack([plain, hiding(WINDOW)])[:, None]
    assert fastattn.explain(q[:1], k[:1], v[:1], bias=bias[:1]).mask == "none"
    both = fastattn.attention(q, k, v, bias=bias, return_lse=True)
    for b in range(2):
        alone = fastattn.attention(*(t[b : b + 1] for t in (q, k, v)), bias=bias[b : b + 1], return_lse=True)
        for whole, part in zip(both, alone):
            assert torch.equal(whole[b : b + 1], part)


def test_opcheck():
    for bias in (hiding(WINDOW), torch.randn(S, S), hiding(WINDOW).mT):
        torch.library.opcheck(torch.ops.fastattn.bias_scan, (bias[None, None],))
    with pytest.raises(RuntimeError, match="floating bias"):
        torch.ops.fastattn.bias_scan(WINDOW[None, None])


COMPILED = {
    "alone": {},
    "causal": {"mask": masks.Causal()},
    "lists": {"mask": masks.BigBird(16)},
    "tensor": {"mask": bools(2, 1, S, S, share=0.9)},
}


@pytest.mark.parametrize("case", COMPILED)
def test_compiles_whole(case):
    """The scan stands in the graph, before what it spares."""
    torch._dynamo.reset()
    operands = [t.requires_grad_() for t in (*inputs(), hiding(WINDOW))]
    graphs = []

    def backend(graph, examples):
        graphs.append(str(graph.graph))
        return torch._dynamo.lookup_backend("aot_eager")(graph, examples)

    def call(q, k, v, bias):
        return fastattn.attention(q, k, v, bias=bias, **COMPILED[case])

    out, expected = torch.compile(call, fullgraph=True, backend=backend)(*operands), call(*operands)
    assert "bias_scan" in graphs[0]
    torch.testing.assert_close(out, expected)
    for ours, wanted in zip(*(torch.autograd.grad(x.sum(), operands) for x in (out, expected))):
        torch.testing.assert_close(ours, wanted)


def test_export():
    class Model(torch.nn.Module):
        def forward(self, q, k, v, bias):
            return fastattn.attention(q, k, v, bias=bias)

    given = (*inputs(), hiding(WINDOW))
    program = torch.export.export(Model(), given)
    other = (*inputs(), hiding(DOCUMENTS))
    torch.testing.assert_close(program.module()(*other), Model()(*other))


def test_transforms_and_fake_tensors_take_a_bias_unread():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    q, k, v = inputs()
    biases = torch.stack([hiding(WINDOW), hiding(DOCUMENTS), torch.randn(S, S)])

    def call(bias):
        return fastattn.attention(q, k, v, bias=bias)

    expected = torch.stack([call(bias) for bias in biases])
    torch.testing.assert_close(torch.func.vmap(call)(biases), expected)
    gradient = torch.func.grad(lambda bias: call(bias).square().sum())(biases[0])
    bias = biases[0].clone().requires_grad_()
    call(bias).square().sum().backward()
    torch.testing.assert_close(gradient, bias.grad)
    mode = FakeTensorMode()
    operands = [mode.from_tensor(t) for t in (q, k, v, bias)]
    with mode:
        fake = fastattn.attention(*operands[:3], bias=operands[3])
    assert fake.shape == expected.shape[1:]
    traced = make_fx(call)(biases[0])
    torch.testing.assert_close(traced(biases[1]), expected[1])


@pytest.mark.filterwarnings("error:.*batching rule")
def test_compiles_mapped():
    """Mapped biases whose lists would differ in length."""
    torch._dynamo.reset()
    q, k, v = inputs()
    biases = torch.stack([hiding(WINDOW), hiding(DOCUMENTS), torch.randn(S, S)])

    def call(bias):
        return fastattn.attention(q, k, v, bias=bias)

    mapped = torch.func.vmap(call)
    torch.testing.assert_close(torch.compile(mapped, backend="aot_eager")(biases), mapped(biases))
