"""softmax, backward: gradients of x and bias for every layout and mask, bitwise repeatable, and of second order."""

import pytest
import torch
from row_checks import DTYPES, LENGTHS, LONG, check_gradients, gradients, misaligned, same_bits

from fastattn import reference
from fastattn.rows import explain, softmax

SOME_LENGTHS = LENGTHS[::3]


def check(x, dim=-1, dy=None, bias=None, **arguments):
    """x's gradient, and bias's."""
    out_dtype = arguments.pop("dtype", None) or x.dtype
    dy = torch.randn(x.shape).to(out_dtype) if dy is None else dy
    kept = dy.clone()
    inputs = [x] if bias is None else [x, bias]

    def ours(x, bias=None):
        return softmax(x, dim, out_dtype, bias=bias, **arguments)

    def exact(x, bias=None):
        return reference.softmax(x, dim, bias=bias, **arguments)

    theirs = None
    if bias is None and not arguments:
        theirs = lambda x: torch.softmax(x, dim, dtype=out_dtype)  # noqa: E731
    result = check_gradients(ours, exact, inputs, [dy], theirs, f"{list(arguments)}", out_dtype)
    assert same_bits(dy, kept), "dy was written to"
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths(isa, dtype):
    for n in SOME_LENGTHS:
        # Rows enough that the largest of their errors says something of the others too.
        check(3 * misaligned(3 + 500 // n, n, dtype, offset=n % 17))


@pytest.mark.parametrize("n", LONG[::2])
def test_long_rows(n):
    for dtype in DTYPES[:2]:
        check(misaligned(2, n, dtype, offset=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape, dim", [((5, 33, 7), 1), ((40, 3), 0), ((2, 130, 4, 9), 1), ((17,), 0), ((0, 3), 1)]
)
def test_other_dimensions(isa, shape, dim, dtype):
    check(torch.randn(shape).to(dtype), dim)


def test_layouts_of_dy():
    x = torch.randn(4, 6, 10)
    for dim in range(3):
        check(x, dim, torch.randn(10, 6, 4).transpose(0, 2))
        check(x.transpose(0, 1), dim, torch.randn(6, 4, 20)[..., ::2])
        check(x, dim, torch.randn(1).expand(4, 6, 10))
        check(x, dim, torch.randn(6, 10).expand(4, 6, 10))
        check(x[:1].expand_as(x), dim)


def test_half_precision_read_as_float32():
    for dtype in DTYPES[1:]:
        check(misaligned(3, 200, dtype, 3), dtype=torch.float32)
        check(torch.randn(9, 4, 3).to(dtype), 0, dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias(isa, dtype):
    x = torch.randn(3, 4, 5, 70).to(dtype)
    mask = torch.rand(5, 70) < 0.8
    mask[2] = False
    for kind in {dtype, torch.float32}:
        for shape in (
            (3, 4, 5, 70),
            (1, 4, 5, 70),
            (4, 1, 70),
            (5, 70),
            (70,),
            (3, 1, 5, 70),
            (3, 4, 1, 70),
            (3, 1, 1, 70),
        ):
            bias = torch.randn(shape).to(kind)
            check(x, bias=bias, scale=-1.7)
        check(
            x,
            bias=torch.where(torch.rand(5, 70) < 0.4, -float("inf"), torch.randn(5, 70)).to(kind),
            mask=mask,
        )
        check(x, 1, bias=torch.randn(4, 1, 70).to(kind))
        check(x, 2, bias=torch.randn(3, 1, 5, 1).to(kind), scale=0.5)
        check(x, 0, bias=torch.randn(3, 1, 1, 1).to(kind))
        check(x, bias=torch.randn(5, 70).to(kind), causal=True)


def test_bias_of_one_number_a_row_has_no_gradient():
    given = [torch.randn(3, 5, 70), torch.randn(3, 5, 1)]
    dx, dbias = gradients(lambda x, b: softmax(x, bias=b), given, [torch.randn(3, 5, 70)])
    assert dbias.abs().max() < 1e-5 and dx.abs().max() > 0.01


def test_only_what_is_asked_for():
    x, bias = torch.randn(3, 5, 70), torch.randn(5, 70)
    dx, dbias = check(x, bias=bias, dy=torch.ones(3, 5, 70).cumsum(-1))
    for which, expected in ((0, dx), (1, dbias)):
        given = [x.clone(), bias.clone()]
        given[which].requires_grad_()
        y = softmax(given[0], bias=given[1])
        y.backward(torch.ones_like(y).cumsum(-1))
        assert same_bits(given[which].grad, expected) and given[1 - which].grad is None


def test_hidden_entries_and_emptied_rows(isa):
    x = torch.randn(4, 9, 70)
    mask = torch.rand(4, 9, 70) < 0.6
    mask[1] = False
    x[~mask] = float("nan")
    (dx,) = gradients(lambda t: softmax(t, mask=mask, scale=0.7), [x], [torch.randn(4, 9, 70)])
    assert (dx[~mask] == 0).all() and dx.isfinite().all() and (dx[1] == 0).all()


def test_bits(threads, task_order):
    x, bias, dy = torch.randn(40, 3, 5, 300), torch.randn(5, 300), torch.randn(40, 3, 5, 300)
    expected = gradients(lambda a, b: softmax(a, bias=b), [x, bias], [dy])
    alone = gradients(lambda a: softmax(a, bias=bias), [x[7:8]], [dy[7:8]])
    assert same_bits(alone[0], expected[0][7:8])
    for count in (1, 2, 3, 5, 7):
        threads(count)
        for seed in (0, 3, 11):
            task_order(seed)
            again = gradients(lambda a, b: softmax(a, bias=b), [x, bias], [dy])
            assert all(same_bits(a, b) for a, b in zip(again, expected))


def test_large():
    x, dy = torch.randn(2100, 4099), torch.randn(2100, 4099)  # 34 MB
    (dx,) = gradients(softmax, [x], [dy])
    (part,) = gradients(softmax, [x[-50:]], [dy[-50:]])
    assert same_bits(dx[-50:], part)


def test_second_derivatives():
    x, bias, dy = (torch.randn(shape, dtype=torch.float64) for shape in ((3, 5, 7), (5, 7), (3, 5, 7)))
    mask = torch.rand(5, 7) < 0.7

    def second(f, dtype):
        given = [t.to(dtype).requires_grad_() for t in (x, bias, dy)]
        y = f(given[0], bias=given[1], mask=mask, scale=0.6)
        first = torch.autograd.grad(y, given[:2], given[2], create_graph=True)
        return torch.autograd.grad([g.square().sum() for g in first], given)

    for a, b in zip(second(softmax, torch.float32), second(reference.softmax, torch.float64)):
        torch.testing.assert_close(a, b.float(), atol=1e-5, rtol=1e-4)


def test_the_kernel_serves_training():
    x = torch.randn(3, 5, requires_grad=True)
    assert explain(softmax, x).kernel == "cpu" and "gradients" in str(explain(softmax, x))
    assert type(softmax(x).grad_fn).__name__ != "DivBackward0"
