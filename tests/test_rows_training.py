"""The row ops in training under torch's machinery: gradcheck, opcheck, compile, checkpoints, torch.func, autocast."""

import pytest
import torch
import torch.nn.functional as F
from row_checks import gradients, same_bits
from torch.utils.checkpoint import checkpoint

from fastattn import rows

ops = torch.ops.fastattn
opcheck = torch.library.opcheck
MASK = torch.tensor([[True, False, True, True, True], [False] * 5, [True] * 5])


def functions(dtype=torch.float32):
    """name -> (function, inputs that take a gradient)."""

    def new(*shape):
        return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()

    x, residual, weight, bias, scores = new(3, 5), new(3, 5), new(5), new(5), new(3, 1)
    return {
        "softmax": (lambda x, b: rows.softmax(x, bias=b, mask=MASK, scale=0.7), (x, bias)),
        "softmax-0": (lambda x, b: rows.softmax(x, 0, bias=b), (x, scores)),
        "layer_norm": (lambda x, w, b: rows.layer_norm(x, 5, w, b, weight_offset=1.0), (x, weight, bias)),
        "rms_norm": (lambda x, w: rows.rms_norm(x, 5, w, 1e-5), (x, weight)),
        "add_layer_norm": (
            lambda x, r, w, b: rows.add_layer_norm(x, r, 5, w, b),
            (x, residual, weight, bias),
        ),
        "add_rms_norm": (lambda x, r, w: rows.add_rms_norm(x, r, 5, w), (x, residual, weight)),
    }


NAMES = tuple(functions())


def total(f):
    """A function of numbers that depends on all outputs, and not evenly."""

    def factors(o):
        return torch.linspace(-1, 2, o.numel(), dtype=torch.float64).view(o.shape)

    def of(*inputs):
        outs = f(*inputs)
        outs = outs if isinstance(outs, tuple) else (outs,)
        return sum(
            (o.double() * torch.linspace(-1, 2, o.numel(), dtype=torch.float64).view(o.shape)).sum()
            for o in outs
        )

    return of


PLAIN = {
    "softmax": lambda x, w, b: rows.softmax(x, 1, scale=0.7),
    "softmax-0": lambda x, w, b: rows.softmax(x, 0),
    "layer_norm": lambda x, w, b: rows.layer_norm(x, 70, w, b, weight_offset=1.0),
    "layer_norm of two dimensions": lambda x, w, b: rows.layer_norm(x, (33, 70)),
    "rms_norm": lambda x, w, b: rows.rms_norm(x, 70, w),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("needs", ["xwb", "x", "wb"])
@pytest.mark.parametrize("name", PLAIN)
def test_plain_calls_train_as_all_others_do(name, needs, dtype, monkeypatch):
    base = [torch.randn(shape).to(dtype) for shape in ((33, 70), (70,), (70,))]
    dy = torch.randn(33, 70).to(dtype)

    def run():
        leaves = [t.clone().requires_grad_(name in needs) for name, t in zip("xwb", base)]
        y = PLAIN[name](*leaves)
        wanted = [t for t in leaves if t.requires_grad]
        if not y.requires_grad:
            return (y,)
        return y, *(g for g in torch.autograd.grad(y, wanted, dy, allow_unused=True) if g is not None)

    plainly = run()
    monkeypatch.setattr(rows, "_is_plain", lambda *tensors: False)
    generally = run()
    assert len(plainly) == len(generally)
    for got, want in zip(plainly, generally):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_in_float64(name):
    f, inputs = functions(torch.float64)[name]
    assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("name", NAMES)
def test_kernels_against_numbers_of_float64(name):
    f, inputs = functions()[name]
    outs = f(*inputs)
    douts = [torch.randn(o.shape) for o in (outs if isinstance(outs, tuple) else (outs,))]
    ours = gradients(f, inputs, douts)
    exact = gradients(f, [t.double() for t in inputs], [d.double() for d in douts])
    for a, b in zip(ours, exact):
        torch.testing.assert_close(a.double(), b, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_whole(name, dtype):
    f, inputs = functions(dtype)[name]
    expected = torch.autograd.grad(total(f)(*inputs), inputs)
    torch._dynamo.reset()  # of() is one code object for every name
    compiled = torch.compile(total(f), fullgraph=True)
    for _ in range(2):
        for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), expected):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_checkpointed(name):
    f, inputs = functions()[name]
    expected = torch.autograd.grad(total(f)(*inputs), inputs)
    for reentrant in (False, True):
        again = [t.detach().clone().requires_grad_() for t in inputs]
        checkpoint(total(f), *again, use_reentrant=reentrant).backward()
        assert all(same_bits(t.grad, b) for t, b in zip(again, expected))


@pytest.mark.parametrize("name", NAMES)
def test_under_torch_func(name):
    f, inputs = functions()[name]
    inputs = [t.detach() for t in inputs]
    expected = gradients(total(f), inputs, [torch.tensor(1.0, dtype=torch.float64)])
    which = tuple(range(len(inputs)))
    for a, b in zip(torch.func.grad(total(f), which)(*inputs), expected):
        torch.testing.assert_close(a, b)
    batch = [torch.stack([t, 2 * t]) for t in inputs]
    for a, b in zip(torch.func.vmap(torch.func.grad(total(f), which))(*batch), expected):
        torch.testing.assert_close(a[0], b)


@pytest.mark.parametrize("name", NAMES)
def test_numerical_jvp(name):
    f, inputs = functions(torch.float64)[name]
    inputs = [t.detach() for t in inputs]
    tangents = [torch.randn_like(t) for t in inputs]
    ours = torch.func.jvp(total(f), tuple(inputs), tuple(tangents))[1]
    step = 1e-6
    ends = [total(f)(*(t + sign * step * d for t, d in zip(inputs, tangents))) for sign in (1, -1)]
    torch.testing.assert_close(ours, (ends[0] - ends[1]) / (2 * step), atol=1e-6, rtol=1e-6)


def test_opcheck_of_the_backward():
    x, dy, weight, bias = torch.randn(4, 6, 10), torch.randn(4, 6, 10), torch.randn(10), torch.randn(6, 10)
    for needs in ([True, True], [True, False], [False, True]):
        opcheck(ops.softmax_bwd.default, (dy, x.softmax(-1), 2, bias, 0.5, torch.bfloat16, needs))
        opcheck(ops.softmax_bwd.default, (dy, x.softmax(0), 0, None, 0.5, torch.float32, needs))
    for rms in (False, True):
        y, stats = ops.norm_fwd(x, 1, weight, None, 1e-5, 0.0, rms)
        for needs in ([True, True, True], [True, False, False], [False, True, False]):
            for dsum, kind in ((None, torch.bfloat16), (dy, None)):
                opcheck(ops.norm_bwd.default, (dy, dsum, x, stats, 1, weight, kind, 1.0, rms, needs))


@pytest.mark.parametrize("name", NAMES)
def test_opcheck_with_gradients(name):
    x, weight = torch.randn(4, 10, requires_grad=True), torch.randn(10, requires_grad=True)
    if name.startswith("softmax"):
        dim = -1 if name == "softmax" else 0
        bias = torch.randn(10 if dim else (4, 1), requires_grad=True)
        opcheck(ops.softmax_fwd.default, (x, dim % 2, None, bias, 0.5, False, False))
        return
    rms = name.endswith("rms_norm")
    options = (1, weight, None if rms else torch.randn(10, requires_grad=True), 1e-5, 0.0, rms)
    if name.startswith("add"):
        residual = torch.randn(4, 10, requires_grad=True)
        opcheck(ops.add_norm_fwd.default, (x, residual, *options, torch.float32))
    else:
        opcheck(ops.norm_fwd.default, (x, *options))


def test_exports_what_trains():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(9))

        def forward(self, x):
            return rows.rms_norm(rows.softmax(x), 9, self.weight)

    model, x = Model(), torch.randn(4, 9)
    program = torch.export.export(model, (x,))
    program.module()(x).square().sum().backward()
    exported = dict(program.module().named_parameters())["weight"]
    model(x).square().sum().backward()
    assert model.weight.grad is not None and exported.shape == model.weight.shape


def test_autocast_follows_torch():
    """The CPU's autocast leaves softmax and the norms in the dtype that they are given."""
    x, weight = torch.randn(4, 9), torch.randn(9, requires_grad=True)
    for dtype in (torch.bfloat16, torch.float32):
        given = x.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            ours = rows.softmax(given), rows.layer_norm(given, 9), rows.rms_norm(given, 9)
            theirs = torch.softmax(given, -1), F.layer_norm(given, [9]), F.rms_norm(given, [9])
            assert [t.dtype for t in ours] == [t.dtype for t in theirs]
            mixed = rows.layer_norm(given, 9, weight)
        (g, gw) = torch.autograd.grad(mixed.float().square().sum(), (given, weight))
        assert g.dtype == dtype and gw.dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_tensor_changed_in_place_is_an_error(name):
    f, inputs = functions()[name]
    if name.startswith("softmax"):
        y = f(*inputs)
        changed = y
    else:
        x = inputs[0] * 1
        y = f(x, *inputs[1:])
        changed = y[1] if isinstance(y, tuple) else x
    with torch.no_grad():
        changed.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (y[0] if isinstance(y, tuple) else y).sum().backward()


def test_one_tensor_as_weight_and_bias():
    """First and second derivatives where two arguments are one tensor, or one is made from another."""
    x, w = torch.randn(3, 7, requires_grad=True), torch.randn(7, requires_grad=True)
    for f in (
        lambda m, x, w: m.layer_norm(x, [7], w, w),
        lambda m, x, w: m.layer_norm(x, [7], x.sum(0), w * x[0]),
    ):
        results = []
        for module in (rows, F):
            first = torch.autograd.grad(f(module, x, w).sin().sum(), (x, w), create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, w))
            results.append((*first, *second))
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)
