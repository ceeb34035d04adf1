"""The Triton kernels of softmax and the norms, forward and backward: on a GPU, or in Triton's interpreter.

The interpreter rounds to bfloat16 towards zero, so bfloat16 is judged on a GPU only; elsewhere it is read and written.
"""

import functools

import pytest
import torch
from row_checks import assert_right, check_gradients, doubled, gradients, poisoned, same_bits

from fastattn import _triton, reference, rows

# The interpreter is numpy, which says what a GPU does silently: 0 / 0, and overflow.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INF = float("inf")
HALF = torch.float16
DTYPES = (torch.float32, HALF, torch.bfloat16) if torch.cuda.is_available() else (torch.float32, HALF)
NORMS = ("layer_norm", "rms_norm")
softmax = functools.partial(rows.softmax, backend="triton")


@pytest.fixture
def launch(triton_device):
    return _triton.module("row_launch")


@pytest.fixture(autouse=True)
def on_device(triton_device):
    with torch.device(triton_device):
        yield


def check_softmax(x, dim=-1, **arguments):
    out = poisoned(x, arguments.get("dtype"))
    assert softmax(x, dim, out=out, **arguments) is out
    kept = {n: t.double() if n == "bias" else t for n, t in arguments.items() if n != "dtype"}
    exact = reference.softmax(x.double(), dim, **kept)
    theirs = torch.softmax(x, dim, **arguments) if set(arguments) <= {"dtype"} else None
    assert_right(out, exact, theirs, f"{list(x.shape)} {x.dtype} {list(arguments)}")
    assert same_bits(out, softmax(x, dim, **arguments))
    return out


# A length for each regime, odd ones, and those beside a power of two.
LENGTHS = [
    (1, "several"),
    (7, "several"),
    (64, "several"),
    (129, "several"),
    (1024, "several"),
    (1031, "whole"),
]
LENGTHS += [(4096, "whole"), (32768, "whole"), (32769, "looped"), (70001, "looped")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, regime", LENGTHS)
def test_softmax_regimes(launch, n, regime, dtype):
    x = 3 * torch.randn(3 if n < 5000 else 2, n).to(dtype)
    assert str(launch.softmax(n, plain=True, strided=False)).startswith(regime)
    assert f"{regime} rows" in str(rows.explain(softmax.func, x, backend="triton"))
    check_softmax(x)


def test_few_launches_serve_every_length(launch):
    """A launch is a compilation, times dtypes, features and whether sizes are multiples of 16."""
    lengths = [*range(1, 5000), *range(5000, 300000, 997)]
    for choose in (
        lambda n: launch.softmax(n, plain=True, strided=False),
        lambda n: launch.softmax(n, plain=False, strided=False),
        lambda n: launch.softmax_backward(n, strided=False),
        launch.norm,
        lambda n: launch.norm_backward(n, sums=True),
    ):
        assert len({choose(n) for n in lengths}) <= 17


def test_rows_more_than_2_31_elements_apart():
    apart = 2**31 + 64
    x = torch.empty(apart + 70, dtype=HALF).as_strided(
        (2, 70), (apart, 1)
    )  # what lies between is never touched
    x.copy_(torch.randn(2, 70))
    check_softmax(x)
    check_norm("layer_norm", x, 70)


@pytest.mark.gpu
def test_more_than_2_31_elements(triton_device):
    if triton_device.type != "cuda":
        pytest.skip("needs a GPU")
    x = torch.randn(40000, 60000, dtype=HALF)
    y, weight = softmax(x), torch.randn(60000)
    assert same_bits(y[-3:], softmax(x[-3:])) and same_bits(y[35790:35800], softmax(x[35790:35800]))
    y = rows.rms_norm(x, 60000, weight, backend="triton")
    assert same_bits(y[-3:], rows.rms_norm(x[-3:], 60000, weight, backend="triton"))


def test_softmax_of_many_rows():
    x = torch.randn(700, 33)
    out = check_softmax(x)
    assert same_bits(softmax(x[600:]), out[600:])


@pytest.mark.parametrize(
    "shape, dim", [((5, 33, 7), 1), ((40, 3), 0), ((2, 300, 4), 1), ((17,), 0), ((3, 1, 5), 1)]
)
def test_softmax_of_other_dimensions(launch, shape, dim):
    for dtype in (torch.float32, HALF):
        x = torch.randn(shape).to(dtype)
        check_softmax(x, dim)
        check_softmax(x, dim, mask=torch.rand(shape) < 0.5)
    copied = "is copied" in str(rows.explain(softmax.func, x, dim, backend="triton"))
    assert copied == (shape[dim] > launch.STRIDED_MOST)


def test_softmax_layouts():
    x = torch.randn(4, 6, 5, 9)
    for view in (x.transpose(1, 2), x.permute(3, 0, 2, 1), x[:, ::2, :, 1:], x[:1].expand_as(x), x[..., ::3]):
        for dim in (1, 3):
            check_softmax(view, dim)
    many = torch.randn(2, 3, 2, 3, 2, 7).permute(4, 1, 3, 0, 2, 5)[:, :, :, :, ::2]
    check_softmax(many)
    check_softmax(many, 1, mask=torch.rand(2, 1, 7) < 0.5)
    out = torch.empty(9, 5, 6, 4).permute(3, 2, 1, 0)
    assert same_bits(softmax(x, 2, out=out), softmax(x, 2))
    inplace = x.clone()
    assert same_bits(softmax(inplace, out=inplace), softmax(x))


def test_softmax_empty_and_dtypes():
    for shape in ((0,), (0, 5), (5, 0), (2, 0, 3)):
        assert softmax(torch.empty(shape)).shape == shape
    x = torch.randn(3, 200).to(HALF)
    check_softmax(x, dtype=torch.float32)
    assert softmax(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(softmax(x.bfloat16()), torch.softmax(x.bfloat16(), -1), rtol=0.01, atol=0)


@pytest.mark.parametrize("n", [40, 133, 9001])
def test_softmax_masks_and_bias(n):
    B, H, S = 2, 3, 2 if n > 9000 else 5
    x, keys = torch.randn(B, H, S, n), torch.rand(B, 1, 1, n) < 0.7
    square = torch.rand(S, n) < 0.5
    square[S - 1] = False
    sliced = (torch.rand(B, H, S, 2 * n) < 0.5)[..., 1::2]
    for mask in (keys, square, sliced, keys.expand(B, H, S, n), torch.zeros(1, 1, dtype=torch.bool)):
        out = check_softmax(x, mask=mask)
        seen = mask.expand_as(x)
        assert (out[~seen] == 0).all() and (out[seen] > 0).all()
        hidden = torch.where(seen, x, float("nan"))
        assert same_bits(softmax(hidden, mask=mask), out)
    check_softmax(x, causal=True, mask=keys, scale=0.3)
    for shape in ((B, H, S, n), (H, 1, n), (n,), (B, 1, S, 1)):
        bias = torch.randn(shape)
        check_softmax(x, bias=bias, scale=-1.7)
        bias = torch.where(torch.rand(shape) < 0.4, -INF, bias)
        out = check_softmax(x.to(HALF), bias=bias, mask=square)
        assert (out[(bias == -INF).expand_as(out)] == 0).all()


@pytest.mark.parametrize("shape", [(5, 5), (3, 4, 9), (2, 9, 4), (1, 1), (3, 17000)])
def test_softmax_causal(shape):
    x = torch.randn(shape)
    out = check_softmax(x, causal=True)
    assert (out[~torch.ones(shape[-2:], dtype=torch.bool).tril().expand(shape)] == 0).all()
    if shape[-1] < 1000:
        check_softmax(x.transpose(-1, -2), causal=True)


def test_softmax_of_a_long_causal_row():
    x = torch.randn(1, 40000).expand(40000, 40000)[39900:39902]  # rows that see 1 and 2 entries
    out = check_softmax(x, causal=True)
    assert torch.equal((out > 0).sum(-1), torch.tensor([1, 2]))


def test_softmax_rows_without_a_finite_number():
    for n in (70, 33000):
        x = torch.full((3, n), -INF)
        x[1, 3] = 0.5
        torch.testing.assert_close(softmax(x), torch.softmax(x, -1), equal_nan=True)
        mask = torch.zeros(3, n, dtype=torch.bool)
        assert (softmax(x, mask=mask) == 0).all()
        mask[0, 5] = True  # one visible entry, and it is -inf
        y = softmax(x, mask=mask)
        assert y[0].isnan().all() and (y[1:] == 0).all()
    assert (softmax(torch.randn(3, 70), bias=torch.full((70,), -INF)) == 0).all()
    for values in ([INF, 0.0, 1.0], [float("nan"), 0.0, 1.0], [-3e38, 0.0, 3e38]):
        x = torch.tensor(values).repeat(2, 11)
        torch.testing.assert_close(softmax(x), torch.softmax(x, -1), equal_nan=True)


def check_softmax_gradients(x, dim=-1, bias=None, dy=None, **arguments):
    dy = torch.randn(x.shape).to(arguments.get("dtype") or x.dtype) if dy is None else dy
    inputs = [x] if bias is None else [x, bias]
    kept = {n: a for n, a in arguments.items() if n != "dtype"}
    function = lambda x, bias=None: softmax(x, dim, bias=bias, **arguments)  # noqa: E731
    exact = lambda x, bias=None: reference.softmax(x, dim, bias=bias, **kept)  # noqa: E731
    theirs = (lambda x: torch.softmax(x, dim)) if bias is None and not arguments else None
    result = check_gradients(function, exact, inputs, [dy], theirs, f"{list(arguments)}", x.dtype)
    again = gradients(function, inputs, [dy])
    assert all(same_bits(a, b) for a, b in zip(result, again))
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, regime", [(1, "several"), (33, "several"), (1031, "whole"), (16385, "looped")])
def test_softmax_backward(launch, n, regime, dtype):
    assert launch.softmax_backward(n, strided=False).regime == regime
    check_softmax_gradients(3 * torch.randn(3 + 500 // n, n).to(dtype))


def test_softmax_backward_layouts():
    x = torch.randn(4, 6, 10)
    for dim in range(3):
        check_softmax_gradients(x, dim, dy=torch.randn(10, 6, 4).transpose(0, 2))
        check_softmax_gradients(x, dim, dy=torch.randn(6, 10).expand(4, 6, 10))
    check_softmax_gradients(torch.randn(2, 300, 3), 1)
    check_softmax_gradients(torch.randn(9, 4).to(HALF), 0, dtype=torch.float32)
    (dx,) = gradients(softmax, [torch.empty(0, 3)], [torch.empty(0, 3)])
    assert dx.shape == (0, 3)


def test_softmax_gradient_of_bias():
    x = torch.randn(3, 4, 5, 70)
    mask = torch.rand(5, 70) < 0.8
    mask[2] = False
    for shape in ((3, 4, 5, 70), (4, 1, 70), (5, 70), (70,), (3, 1, 5, 70), (3, 4, 1, 70), (3, 1, 1, 70)):
        check_softmax_gradients(x, bias=torch.randn(shape), scale=-1.7)
    hidden = torch.where(torch.rand(5, 70) < 0.4, -INF, torch.randn(5, 70))
    dx, _ = check_softmax_gradients(x, bias=hidden, mask=mask)
    assert (dx[:, :, 2] == 0).all()
    check_softmax_gradients(x.to(HALF), bias=torch.randn(5, 70).to(HALF))
    check_softmax_gradients(x, 1, bias=torch.randn(4, 1, 70))
    check_softmax_gradients(x, 2, bias=torch.randn(3, 1, 5, 1), scale=0.5)
    check_softmax_gradients(x, bias=torch.randn(5, 70), causal=True)
    many = torch.randn(2, 3, 2, 3, 2, 7)
    check_softmax_gradients(many, bias=torch.randn(3, 1, 3, 1, 7))
    given = [x.clone(), torch.randn(5, 70, requires_grad=True)]
    softmax(given[0], bias=given[1]).square().sum().backward()
    assert given[0].grad is None and given[1].grad.isfinite().all()


def parameters(name, n, dtype):
    shape = (n,) if isinstance(n, int) else n
    return [torch.randn(shape).to(dtype) for _ in range(2 if name == "layer_norm" else 1)]


def check_norm(name, x, n, weights=(), eps=1e-5, **arguments):
    function = functools.partial(getattr(rows, name), backend="triton")
    out = poisoned(x)
    assert function(x, n, *weights, eps=eps, out=out, **arguments) is out
    exact = getattr(reference, name)(x.double(), n, *(w.double() for w in weights), eps=eps, **arguments)
    assert_right(out, exact, what=f"{name} {list(x.shape)} {x.dtype}")
    assert same_bits(out, function(x, n, *weights, eps=eps, **arguments))
    return out


NORM_LENGTHS = [
    (1, "several"),
    (7, "several"),
    (768, "several"),
    (1031, "whole"),
    (16384, "whole"),
    (16385, "looped"),
]


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, regime", [*NORM_LENGTHS, (70001, "looped")])
def test_norm_regimes(launch, name, n, regime, dtype):
    assert launch.norm(n).regime == regime
    x = torch.randn(3 + 500 // n, n).to(dtype)
    assert f"{regime} rows" in str(rows.explain(getattr(rows, name), x, n, backend="triton"))
    check_norm(name, x, n, parameters(name, n, dtype))


@pytest.mark.parametrize("name", NORMS)
def test_norm_arguments(name):
    x = torch.randn(4, 6, 10, 14)
    for dtype in (torch.float32, HALF):
        check_norm(name, x[0, 0].to(dtype), 14, weight_offset=1.0)
        check_norm(name, x[0, 0].to(dtype), 14, parameters(name, 14, torch.float32), weight_offset=1.0)
        check_norm(name, x[0, 0], 14, parameters(name, 14, dtype)[:1])
    weights = parameters(name, (10, 14), HALF)
    for view in (x, x.transpose(0, 1), x[::2], x.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2)):
        check_norm(name, view, (10, 14), weights)
    many = torch.randn(2, 3, 2, 3, 2, 7).permute(4, 1, 3, 0, 2, 5)
    check_norm(name, many, 7)
    inplace = x.clone()
    function = functools.partial(getattr(rows, name), backend="triton")
    assert same_bits(function(inplace, 14, out=inplace), function(x, 14))
    for shape in ((0, 5), (3, 0)):
        assert function(torch.randn(shape), shape[-1]).shape == shape


@pytest.mark.parametrize("n", [130, 1031, 20000])
def test_large_means_and_extremes(n):
    for mean in (1e4, 1e6):
        check_norm("layer_norm", torch.randn(4, n) + mean, n)
    drifting = torch.randn(2, n) + torch.where(torch.arange(n) < n // 2, 0.0, 1e5)
    check_norm("layer_norm", drifting, n)
    for name in NORMS:
        for scale, eps in ((1e30, 1e-5), (1e-30, 0.0), (1e15, 1e-5)):
            check_norm(name, torch.randn(3, n).clamp(-3, 3) * scale, n, eps=eps)
    assert (check_norm("layer_norm", torch.full((2, n), 1e30), n) == 0).all()
    x = torch.randn(4, n)
    x[0, 5], x[1, 7] = INF, float("nan")
    y = rows.layer_norm(x, n, backend="triton")
    assert y[:2].isnan().all() and same_bits(y[2:], rows.layer_norm(x[2:], n, backend="triton"))


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("n", [77, 17001])
def test_add_norm(name, n):
    function = functools.partial(getattr(rows, f"add_{name}"), backend="triton")
    alone = functools.partial(getattr(rows, name), backend="triton")
    for dtype, kind, sum_dtype in (
        (torch.float32, HALF, None),
        (HALF, HALF, None),
        (HALF, HALF, torch.float32),
    ):
        x, residual = torch.randn(3, n).to(dtype), torch.randn(3, n).to(kind)
        weights, total = parameters(name, n, dtype), sum_dtype or kind
        out, sum_out = poisoned(x), poisoned(x, total)
        y, s = function(x, residual, n, *weights, sum_dtype=sum_dtype, out=out, sum_out=sum_out, eps=1e-5)
        assert y is out and s is sum_out and same_bits(s, (x.float() + residual.float()).to(total))
        exact = getattr(reference, name)(s.double(), n, *(w.double() for w in weights), eps=1e-5)
        assert_right(y, exact, what=f"add_{name} {dtype} {kind} {sum_dtype}")
        if total == dtype:
            assert same_bits(y, alone(s, n, *weights, eps=1e-5))
        fresh = function(x, residual, n, *weights, sum_dtype=sum_dtype, eps=1e-5)
        assert same_bits(fresh[0], y) and same_bits(fresh[1], s)
        again = residual.clone()
        if total == kind:
            function(x, again, n, *weights, eps=1e-5, sum_out=again)
            assert same_bits(again, s)


def check_norm_gradients(name, x, n, weights=(), dy=None, eps=1e-5, **arguments):
    dy = torch.randn(x.shape).to(x.dtype) if dy is None else dy
    function, exact = (
        functools.partial(getattr(rows, name), backend="triton"),
        getattr(reference, name),
    )
    ours = lambda x, *w: function(x, n, *w, eps=eps, **arguments)  # noqa: E731
    result = check_gradients(
        ours,
        lambda x, *w: exact(x, n, *w, eps=eps, **arguments),
        [x, *weights],
        [dy],
        what=f"{name} {arguments}",
    )
    assert all(same_bits(a, b) for a, b in zip(result, gradients(ours, [x, *weights], [dy])))
    return result


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, regime", [(7, "several"), (129, "several"), (5000, "whole"), (8193, "looped")])
def test_norm_backward(launch, name, n, regime, dtype):
    assert launch.norm_backward(n, sums=True).regime == regime
    check_norm_gradients(name, torch.randn(21 if n < 5000 else 5, n).to(dtype), n, parameters(name, n, dtype))


@pytest.mark.parametrize("name", NORMS)
def test_norm_backward_arguments(launch, name):
    x = torch.randn(9, 77)
    check_norm_gradients(name, x, 77)
    check_norm_gradients(name, x, 77, parameters(name, 77, HALF), weight_offset=1.0)
    check_norm_gradients(name, x.to(HALF), 77, parameters(name, 77, torch.float32)[:1])
    # More rows than the groups take in one step, so that a group has several.
    cut = launch.norm_backward(5, sums=True)
    check_norm_gradients(name, torch.randn(cut.groups * cut.BLOCK_M // 64, 5), 5, parameters(name, 5, HALF))
    check_norm_gradients(name, torch.randn(cut.groups + 40, 2100), 2100, parameters(name, 2100, HALF))
    x = torch.randn(4, 6, 10, 14)
    weights = parameters(name, 14, torch.float32)
    for dy in (torch.randn(4, 6, 10, 28)[..., ::2], torch.randn(10, 14).expand(4, 6, 10, 14)):
        check_norm_gradients(name, x, 14, weights, dy)
    check_norm_gradients(name, x.transpose(0, 1), 14, weights)
    function = functools.partial(getattr(rows, name), backend="triton")
    for shape in ((0, 5), (3, 0)):
        given = [torch.randn(shape), *parameters(name, shape[-1], torch.float32)]
        result = gradients(lambda x, *w, n=shape[-1]: function(x, n, *w), given, [torch.randn(shape)])
        assert all(g.shape == t.shape and (g == 0).all() for g, t in zip(result, given))
    for which in range(len(weights) + 1):
        given = [t.clone() for t in (x, *weights)]
        given[which].requires_grad_()
        function(given[0], 14, *given[1:]).square().sum().backward()
        assert all((t.grad is not None) == (i == which) for i, t in enumerate(given))


def test_norm_backward_of_large_means():
    for n in (130, 9000):
        check_norm_gradients(
            "layer_norm", torch.randn(4, n) + 1e6, n, parameters("layer_norm", n, torch.float32)
        )
    x, dy = torch.randn(50, 1), torch.randn(50, 1)
    dx, dweight, dbias = check_norm_gradients(
        "layer_norm", x, 1, parameters("layer_norm", 1, torch.float32), dy
    )
    assert (dx == 0).all() and (dweight == 0).all() and dbias != 0


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("n", [77, 8200])
def test_add_norm_backward(name, n):
    ours = functools.partial(getattr(rows, f"add_{name}"), backend="triton")
    exact = getattr(reference, f"add_{name}")
    for dtype, kind in ((torch.float32, torch.float32), (HALF, torch.float32)):
        x, residual = torch.randn(9, n).to(dtype), torch.randn(9, n).to(kind)
        weights = parameters(name, n, dtype)
        douts = [torch.randn(9, n).to(dtype), torch.randn(9, n).to(kind)]
        given = gradients(lambda x, r, *w: ours(x, r, n, *w), [x, residual, *weights], douts)
        at = (x.float() + residual.float()).to(kind)
        expected = gradients(
            lambda h, *w: exact(h, torch.zeros_like(h), n, *w), doubled_all(at, *weights), doubled_all(*douts)
        )
        for a, b in zip(given, (expected[0], *expected)):
            assert_right(a, b, what=f"add_{name} {dtype} {kind}")


def doubled_all(*tensors):
    return list(doubled(dict(enumerate(tensors))).values())


def test_statistics_are_the_cpu_kernels(triton_device):
    """A forward of one namespace and a backward of the other: stats have one layout."""
    x = torch.randn(5, 300) + 1e5
    for rms in (False, True):
        stats = torch.ops.fastattn_triton.norm_fwd(x, 1, None, None, 1e-5, 0.0, rms)[1].cpu()
        theirs = torch.ops.fastattn.norm_fwd(x.cpu(), 1, None, None, 1e-5, 0.0, rms)[1]
        assert stats.shape == theirs.shape
        torch.testing.assert_close(stats[0], theirs[0])
        torch.testing.assert_close(stats[1:].sum(0), theirs[1:].sum(0))


def test_ops_as_torch_wants_them(triton_device):
    ops, check = torch.ops.fastattn_triton, torch.library.opcheck
    x, bias = torch.randn(3, 20, requires_grad=True), torch.randn(20, requires_grad=True)
    check(ops.softmax_fwd.default, (x, 1, None, bias, 0.5, False, False))
    check(ops.norm_fwd.default, (x, 1, bias, None, 1e-5, 0.0, True))
    check(
        ops.add_norm_fwd.default,
        (x, x.detach() * 2, 1, bias, bias.detach() * 2, 1e-5, 0.0, False, torch.float32),
    )
    check(ops.softmax_out.default, (x.detach(), 1, None, None, 1.0, False, torch.empty(3, 20)))


def test_second_derivatives():
    x, dy = torch.randn(3, 7, requires_grad=True), torch.randn(3, 7)
    for function in (softmax, lambda t: rows.layer_norm(t, 7, backend="triton")):
        (first,) = torch.autograd.grad(function(x), x, dy, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        assert second.isfinite().all() and second.abs().max() > 0


def test_refusals(monkeypatch):
    x = torch.randn(3, 5)
    with pytest.raises(RuntimeError, match="x is float64, which is computed by the reference"):
        softmax(x.double())
    with pytest.raises(RuntimeError, match="a single number"):
        softmax(torch.tensor(1.0), 0)
    if x.is_cpu:
        assert "interpreter runs only for backend" in dict(rows.explain(rows.softmax, x).refusals)["triton"]
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        with pytest.raises(RuntimeError, match="x is on cpu, not on a CUDA or ROCm device"):
            softmax(x)
