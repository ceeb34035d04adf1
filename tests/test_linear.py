"""The kernel of a linear layer, `linear_fwd`, by the error rule, to the bit, and as torch sees it."""

import pytest
import torch
import torch.nn.functional as F

from fastattn.tools.equivalence import error_rule

linear = torch.ops.fastattn.linear_fwd.default
ACTIVATIONS = {"none": lambda t: t, "relu": F.relu, "gelu": F.gelu}
# M, N, K: primes, remainders of tiles, vectors, panels and groups, nothing to sum, one of each.
SHAPES = [
    (67, 101, 53),
    (64, 48, 64),
    (129, 15, 31),
    (1, 65, 16),
    (2, 1, 1),
    (63, 7, 0),
    (17, 49, 769),
    (70, 50, 1537),
]


def operands(M, N, K):
    return torch.randn(M, K), torch.randn(N, K), torch.randn(N)


def right(y, x, weight, bias, activation):
    act = ACTIVATIONS[activation]
    exact = act(F.linear(x.double(), weight.double(), None if bias is None else bias.double()))
    return error_rule(y, exact, act(F.linear(x, weight, bias)))


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_like_torch(activation, biased, isa):
    for shape in SHAPES:
        x, weight, bias = operands(*shape)
        bias = bias if biased else None
        assert right(linear(x, weight, bias, activation), x, weight, bias, activation), shape


@pytest.mark.parametrize("values", [torch.randn, torch.rand])
def test_long_sums(values, isa):
    """More steps than a panel has: their roundings do not add up in one chain, which of positive numbers shows."""
    x, weight = values(66, 8000), values(50, 8000)
    assert right(linear(x, weight, None, "none"), x, weight, None, "none")


def test_nothing():
    for M, N, K in ((0, 5, 3), (4, 0, 3), (0, 0, 0)):
        assert linear(*operands(M, N, K), "gelu").shape == (M, N)
    bias = torch.randn(3)
    assert torch.equal(linear(torch.empty(2, 0), torch.empty(3, 0), bias, "none"), bias.expand(2, 3))


def test_gelu_to_the_last_digits(isa):
    """Where 1 + erf cancels too, unlike torch's."""
    x = torch.cat([torch.linspace(-12, 12, 20001), torch.logspace(-30, 0, 200), -torch.logspace(-30, 0, 200)])
    y = linear(x[:, None], torch.ones(1, 1), None, "gelu")[:, 0].double()
    exact = x.double() * torch.special.erfc(-x.double() / 2**0.5) / 2
    error = ((y - exact) / exact.where(x != 0, torch.ones(()))).abs()
    assert error[x > -3].max() < 8e-7 and error.max() < 1e-5


def test_dimensions_and_strides():
    weight, bias = torch.randn(33, 20), torch.randn(33)
    base = torch.randn(3, 7, 5, 40)
    views = {
        "a row": base[0, 0, 0, :20],
        "a batch": base[..., :20],
        "an offset": base[..., 3:23],
        "every other": base[..., ::2],
        "transposed rows": base.transpose(0, 2)[..., :20],
        "columns first": torch.randn(20, 50).t(),
        "one row for all": torch.randn(1, 20).expand(70, 20),
        "one number a row": torch.randn(70, 1).expand(70, 20),
        "one in the middle": base[:, :1, :, :20],
    }
    for name, x in views.items():
        y = linear(x, weight, bias, "relu")
        assert y.is_contiguous() and y.shape == (*x.shape[:-1], 33), name
        assert torch.equal(y, linear(x.contiguous(), weight, bias, "relu")), name
    x = base[0, ..., :20]
    expected = linear(x, weight, bias, "none")
    for other in (weight.t().contiguous().t(), torch.cat((weight, weight), 1)[:, 20:]):
        assert torch.equal(linear(x, other, bias, "none"), expected)
    assert torch.equal(linear(x, weight, torch.stack((bias, bias), 1)[:, 1], "none"), expected)
    # In place: the last numbers of x and of weight are the last of their memory.
    assert torch.equal(
        linear(x[:, :, 7:], weight[:, 7:], bias, "none"),
        linear(x[:, :, 7:].clone(), weight[:, 7:].clone(), bias, "none"),
    )


@pytest.mark.parametrize("shape", [(200, 500, 70), (150, 300, 4001)])
def test_no_bit_depends_on_threads_or_tasks(shape, threads, task_order, isa):
    x, weight, bias = operands(*shape)
    threads(1)
    expected = linear(x, weight, bias, "gelu")
    for count in (1, 2, 3, 5, 7):
        threads(count)
        for seed in (0, 1, 5):
            task_order(seed)
            assert torch.equal(linear(x, weight, bias, "gelu"), expected), (count, seed)


@pytest.mark.parametrize("K", [50, 800, 4000])
def test_a_row_does_not_know_the_others(K, isa):
    x, weight, bias = operands(131, 70, K)
    together = linear(x, weight, bias, "gelu")
    for i in (0, 1, 63, 64, 99, 130):
        assert torch.equal(linear(x[i : i + 1], weight, bias, "gelu"), together[i : i + 1])
    for n in (5, 16, 17, 64, 65, 128):
        assert torch.equal(linear(x[:n], weight, bias, "gelu"), together[:n])
    # Nor an output the others.
    assert torch.equal(linear(x, weight[:9], bias[:9], "gelu"), together[:, :9])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_finite_spreads_no_further(activation, isa):
    x, weight, bias = operands(70, 40, 20)
    x[3, 5], x[66, 0], weight[9, 19], bias[20] = float("nan"), float("inf"), float("inf"), float("nan")
    y = linear(x, weight, bias, activation)
    # Torch's own gelu of an infinite float32 is NaN.
    exact = ACTIVATIONS[activation](F.linear(x.double(), weight.double(), bias.double()))
    assert error_rule(y, exact)


def test_opcheck():
    x, weight, bias = operands(5, 7, 3)
    for args in (
        (x, weight, bias, "gelu"),
        (x[0], weight, None, "none"),
        (x.expand(2, 5, 3), weight, bias, "relu"),
    ):
        torch.library.opcheck(linear, args)


def test_refusals():
    x, weight, bias = operands(5, 7, 3)
    for args, said in (
        ((x.double(), weight, bias, "none"), "x must be float32"),
        ((x, weight.bfloat16(), bias, "none"), "weight must be float32"),
        ((x, weight, bias.double(), "none"), "bias must be float32"),
        ((x, weight, bias, "tanh"), 'activation must be "none", "relu" or "gelu", got "tanh"'),
        ((x, weight[0], bias, "none"), "weight must have 2 dimensions, got 1"),
        ((x, weight[:, :2], bias, "none"), "weight must have x's last size 3 as its own, got 2"),
        ((x, weight, bias[:6], "none"), r"bias must be of size \[7\], got"),
        ((x[0, 0], weight, bias, "none"), "x must have a dimension or more"),
    ):
        with pytest.raises(RuntimeError, match=said):
            linear(*args)
