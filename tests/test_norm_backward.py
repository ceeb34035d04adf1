"""layer_norm, rms_norm and their fusions with a residual, backward: every gradient, bits, and second order."""

import pytest
import torch
import torch.nn.functional as F
from row_checks import (
    DTYPES,
    LENGTHS,
    LONG,
    assert_right,
    check_gradients,
    gradients,
    misaligned,
    over,
    same_bits,
)

from fastattn import reference, rows

NORMS = ("layer_norm", "rms_norm")


def parameters(name, n, dtype):
    shape = (n,) if isinstance(n, int) else n
    return [torch.randn(shape).to(dtype) for _ in range(2 if name == "layer_norm" else 1)]


def check(name, x, n, weights=(), dy=None, eps=1e-5, **arguments):
    """The gradients of x, weight and bias."""
    dy = torch.randn(x.shape).to(x.dtype) if dy is None else dy
    kept = dy.clone()
    ours, exact, torchs = (getattr(m, name) for m in (rows, reference, F))
    shape = [n] if isinstance(n, int) else list(n)
    theirs = None
    # torch's layer_norm is wrong for one column (pytorch #188375), where the only oracle is float64.
    if not arguments and all(w.dtype == x.dtype for w in weights) and (n != 1 or name == "rms_norm"):
        theirs = lambda x, *w: torchs(x, shape, *w, eps=eps)  # noqa: E731
    result = check_gradients(
        lambda x, *w: ours(x, n, *w, eps=eps, **arguments),
        lambda x, *w: exact(x, n, *w, eps=eps, **arguments),
        [x, *weights],
        [dy],
        theirs,
        f"{name} {arguments}",
    )
    assert same_bits(dy, kept), "dy was written to"
    return result


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths(isa, name, dtype):
    for n in LENGTHS[::3]:
        check(name, misaligned(3, n, dtype, offset=n % 17), n, parameters(name, n, dtype))


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("n", LONG[::2])
def test_long_rows(name, n):
    for dtype in DTYPES[:2]:
        check(name, misaligned(3, n, dtype, offset=1), n, parameters(name, n, dtype))


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows(name, dtype):
    for count in (1, 7, 8, 9, 63, 700, 5000):
        check(name, torch.randn(count, 65).to(dtype), 65, parameters(name, 65, dtype))


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights(isa, name, dtype):
    x = misaligned(9, 77, dtype, 0)
    check(name, x, 77)
    for kind in DTYPES:
        check(name, x, 77, parameters(name, 77, kind), weight_offset=1.0)
        check(name, x, 77, parameters(name, 77, kind)[:1])
    if name == "layer_norm":
        check_gradients(
            lambda x, b: rows.layer_norm(x, 77, None, b),
            lambda x, b: reference.layer_norm(x, 77, None, b),
            [x, torch.randn(77).to(dtype)],
            [torch.randn(9, 77).to(dtype)],
        )


@pytest.mark.parametrize("name", NORMS)
def test_layouts(name):
    x = torch.randn(4, 6, 10, 14)
    for dims in (1, 2):
        shape = x.shape[-dims:]
        weights = parameters(name, tuple(shape), torch.float32)
        for dy in (
            torch.randn(14, 10, 6, 4).permute(3, 2, 1, 0),
            torch.randn(4, 6, 10, 28)[..., ::2],
            torch.randn(1).expand(4, 6, 10, 14),
            torch.randn(10, 14).expand(4, 6, 10, 14),
            torch.randn(6, 4, 10, 14).transpose(0, 1),
        ):
            check(name, x, tuple(shape), weights, dy)
        check(name, x.transpose(0, 1), tuple(shape), weights)
        check(name, x.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2), tuple(shape), weights)
    for shape in ((0, 5), (3, 0)):
        given = [torch.randn(shape), *parameters(name, shape[-1], torch.float32)]
        result = gradients(over(getattr(rows, name), shape[-1]), given, [torch.randn(shape)])
        assert all(g.shape == t.shape and (g == 0).all() for g, t in zip(result, given))


def test_width_one_is_exactly_zero(isa):
    x, dy = torch.randn(50, 1), torch.randn(50, 1)
    x[3] = 1e6 + 0.5
    dx, dweight, dbias = check("layer_norm", x, 1, parameters("layer_norm", 1, torch.float32), dy)
    assert (dx == 0).all() and (dweight == 0).all() and dbias != 0


@pytest.mark.parametrize("mean", [1e4, 1e6])
@pytest.mark.parametrize("n", [130, 5000])
def test_large_means(isa, mean, n):
    check("layer_norm", torch.randn(4, n) + mean, n, parameters("layer_norm", n, torch.float32))


@pytest.mark.parametrize("name", NORMS)
def test_extremes(isa, name):
    for scale, eps in ((1e30, 1e-5), (1e-30, 0.0), (1e15, 1e-5)):
        for n in (2, 65, 5000):
            x = torch.randn(3, n).clamp(-3, 3) * scale
            dy = torch.randn(3, n)
            given = [x, *parameters(name, n, torch.float32)]
            ours = gradients(over(getattr(rows, name), n, eps=eps), given, [dy])
            exact = gradients(over(getattr(reference, name), n, eps=eps), [t.double() for t in given], [dy])
            for a, b in zip(ours, exact):
                assert a.isfinite().all()
                close = {"rtol": 1e-3, "atol": 2e-5 * b.abs().max().item()}
                if n > 2 or name == "rms_norm":  # of two columns the exact gradient is a rest of rounding
                    torch.testing.assert_close(a.double(), b, **close)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add(isa, name, dtype):
    ours, exact = getattr(rows, f"add_{name}"), getattr(reference, f"add_{name}")
    for kind in DTYPES:
        for sum_dtype in (None, torch.float32):
            total = torch.float32 if sum_dtype else kind
            x, residual = misaligned(9, 77, dtype, 3), misaligned(9, 77, kind, 1, seed=9)
            # The exact gradient is that at the rounded sum, which the kernel's is too.
            at = (x.float() + residual.float()).to(total)
            weights = parameters(name, 77, dtype)
            dy, dsum = torch.randn(9, 77).to(dtype), torch.randn(9, 77).to(total)
            given, theirs = (
                gradients(
                    lambda x, r, *w, f=f, kind=sum_dtype: f(x, r, 77, *w, sum_dtype=kind),
                    [x, residual, *weights],
                    [dy, dsum],
                )
                for f in (ours, exact)
            )
            expected = gradients(
                lambda h, *w: exact(h, torch.zeros_like(h), 77, *w),
                [t.double() for t in (at, *weights)],
                [dy.double(), dsum.double()],
            )
            for a, b, c in zip(given, (expected[0], *expected), theirs):
                assert_right(a, b, c, what=f"{name} {dtype} {kind} {total}")


@pytest.mark.parametrize("name", NORMS)
def test_add_with_one_output_used(name):
    ours = getattr(rows, f"add_{name}")
    x, residual, w = (torch.randn(s, requires_grad=True) for s in ((5, 40), (5, 40), (40,)))
    y, total = ours(x, residual, 40, w)
    dy = torch.randn(5, 40)
    of_sum = torch.autograd.grad(total, (x, residual, w), dy, retain_graph=True, allow_unused=True)
    assert same_bits(of_sum[0], dy) and same_bits(of_sum[1], dy) and of_sum[2] is None
    of_y = torch.autograd.grad(y, (x, residual, w), dy, retain_graph=True)
    alone = gradients(lambda h, w: getattr(rows, name)(h, 40, w), [total, w], [dy])
    assert same_bits(of_y[0], alone[0]) and same_bits(of_y[1], alone[0]) and same_bits(of_y[2], alone[1])


@pytest.mark.parametrize("name", NORMS)
def test_only_what_is_asked_for(name):
    given = [torch.randn(9, 40), *parameters(name, 40, torch.float32)]
    dy = torch.randn(9, 40)
    expected = gradients(lambda x, *w: getattr(rows, name)(x, 40, *w), given, [dy])
    for which in range(len(given)):
        leaves = [t.clone() for t in given]
        leaves[which].requires_grad_()
        getattr(rows, name)(leaves[0], 40, *leaves[1:]).backward(dy)
        assert same_bits(leaves[which].grad, expected[which])
        assert all(t.grad is None for i, t in enumerate(leaves) if i != which)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits(name, dtype, threads, task_order):
    x, dy = torch.randn(700, 300).to(dtype), torch.randn(700, 300).to(dtype)
    given = [x, *parameters(name, 300, dtype)]

    def run():
        return gradients(lambda x, *w: getattr(rows, name)(x, 300, *w), given, [dy])

    expected = run()
    (alone, *_) = gradients(lambda x, *w: getattr(rows, name)(x, 300, *w), [x[7:8], *given[1:]], [dy[7:8]])
    assert same_bits(alone, expected[0][7:8])
    for count in (1, 2, 3, 5, 7):
        threads(count)
        for seed in (0, 3, 11):
            task_order(seed)
            assert all(same_bits(a, b) for a, b in zip(run(), expected))


def test_fifty_repeats_are_one(threads):
    threads(2)
    x, w, dy = torch.randn(2000, 130), torch.randn(130), torch.randn(2000, 130)
    results = [gradients(lambda x, w: rows.rms_norm(x, 130, w), [x, w], [dy]) for _ in range(50)]
    assert all(same_bits(a, b) for r in results for a, b in zip(r, results[0]))


@pytest.mark.parametrize("name", NORMS)
def test_large(name):
    x, dy = torch.randn(8200, 1031), torch.randn(8200, 1031)  # 34 MB, no row aligned as the one before
    (dx,) = gradients(lambda x: getattr(rows, name)(x, 1031), [x], [dy])
    (part,) = gradients(lambda x: getattr(rows, name)(x, 1031), [x[-50:]], [dy[-50:]])
    assert same_bits(dx[-50:], part)
    # Rows too long for a block of several, the first of them aligned and the others not.
    n = 262145
    given = [torch.randn(33, n), *parameters(name, n, torch.float32)]
    dy = torch.randn(33, n)
    results = gradients(over(getattr(rows, name), n), given, [dy])
    part = gradients(over(getattr(rows, name), n), [given[0][-2:], *given[1:]], [dy[-2:]])
    assert same_bits(results[0][-2:], part[0])
    if name == "layer_norm":
        assert_right(results[-1], dy.double().sum(0), dy.sum(0))


@pytest.mark.parametrize("name", NORMS)
def test_second_derivatives(name):
    x, residual, dy, dsum = (torch.randn(5, 9, dtype=torch.float64) for _ in range(4))
    weights = parameters(name, 9, torch.float64)

    def second(module, dtype, add):
        given = [t.to(dtype).requires_grad_() for t in (x, *([residual] if add else []), *weights)]
        cotangents = [t.to(dtype).requires_grad_() for t in ((dy, dsum) if add else (dy,))]
        if add:
            out = getattr(module, f"add_{name}")(given[0], given[1], 9, *given[2:])
        else:
            out = getattr(module, name)(given[0], 9, *given[1:])
        first = torch.autograd.grad(out, given, cotangents, create_graph=True)
        squares = [g.square().sum() for g in first]
        return torch.autograd.grad(squares, [*given, *cotangents], materialize_grads=True)

    for add in (False, True):
        for a, b in zip(second(rows, torch.float32, add), second(reference, torch.float64, add)):
            torch.testing.assert_close(a, b.float(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_an_empty_batch_has_gradients(name):
    x, weight = torch.randn(0, 10, 24, requires_grad=True), torch.randn(24, requires_grad=True)
    getattr(rows, name)(x, 24, weight).sum().backward()
    assert x.grad.shape == x.shape and not weight.grad.any()
