"""rms_norm and add_rms_norm, forward: lengths, dtypes, zero-centred weights, extremes, and bits."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from row_checks import (
    DTYPES,
    LENGTHS,
    LONG,
    assert_right,
    check_add_norm,
    check_norm,
    misaligned,
    poisoned,
    same_bits,
)

from fastattn import reference
from fastattn.rows import add_rms_norm, explain, rms_norm

INF = float("inf")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths(isa, dtype):
    for n in LENGTHS:
        check_norm("rms_norm", misaligned(3, n, dtype, offset=n % 17), n, weight=torch.randn(n).to(dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_length(dtype):
    for n in range(1, 4097):
        check_norm("rms_norm", misaligned(2, n, dtype, offset=n % 16), n, weight=torch.randn(n).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", LONG)
def test_long_rows(n, dtype):
    check_norm("rms_norm", misaligned(2, n, dtype, offset=1), n, weight=torch.randn(n).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alignment_changes_nothing(isa, dtype):
    for n in (1, 7, 31, 33, 130):
        first = rms_norm(misaligned(3, n, dtype, 0), n)
        for offset in range(1, 33):
            x = misaligned(3, n, dtype, offset)
            out = torch.empty(offset + x.numel(), dtype=dtype)[offset:].view_as(x)
            assert same_bits(rms_norm(x, n, out=out), first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights(isa, dtype):
    x = misaligned(5, 77, dtype, 0)
    check_norm("rms_norm", x, 77)
    for kind in DTYPES:
        for offset in (0.0, 1.0):  # 1: Gemma's weights
            check_norm("rms_norm", x, 77, weight=torch.randn(77).to(kind), weight_offset=offset)


def test_shapes_and_layouts():
    x = torch.randn(4, 6, 10, 14)
    for view in (x, x.transpose(0, 1), x[:, ::2], x[:1].expand_as(x), x.permute(3, 2, 1, 0), x[..., 1:]):
        for dims in (1, 3):
            shape = view.shape[-dims:]
            check_norm("rms_norm", view, shape, weight=torch.randn(shape))
    for shape in ((0, 5), (3, 0), (0,)):
        assert rms_norm(torch.empty(shape), shape[-1]).shape == shape


def test_eps():
    x = torch.randn(3, 40) * 1e-4
    for dtype in DTYPES:
        given = x.to(dtype)
        exact = reference.rms_norm(given.double(), 40, eps=torch.finfo(torch.float32).eps)
        assert_right(rms_norm(given, 40), exact, F.rms_norm(given, [40]))
    for eps in (0.0, 1e-12, 1e-6, 1.0):
        check_norm("rms_norm", x, 40, eps=eps)
    assert rms_norm(x.double(), 40).dtype == torch.float64


def test_extremes(isa):
    for scale, eps in itertools.product((1e30, 3e37, 1e-30), (0.0, 1e-6)):
        for n in (1, 2, 65, 5000):
            x = torch.randn(3, n).clamp(-3, 3) * scale
            exact = reference.rms_norm(x.double(), n, eps=eps)
            assert_right(rms_norm(x, n, eps=eps), exact, what=f"{scale} {eps} {n}")
    assert (rms_norm(torch.zeros(2, 5), 5) == 0).all()
    x = torch.randn(4, 50)
    x[0, 3], x[1, 4] = INF, float("nan")
    torch.testing.assert_close(rms_norm(x, 50, eps=1e-6), F.rms_norm(x, [50], eps=1e-6), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add(isa, dtype):
    for kind, sum_dtype in itertools.product(DTYPES, (None, *DTYPES)):
        for n in (1, 33, 200):
            x, residual = misaligned(4, n, dtype, 3), misaligned(4, n, kind, 1, seed=9)
            check_add_norm("rms_norm", x, residual, n, sum_dtype=sum_dtype, weight=torch.randn(n).to(dtype))
    y, total = add_rms_norm(x, residual, 200)
    assert same_bits(add_rms_norm(x, residual, 200, eps=torch.finfo(torch.float32).eps)[0], y)
    big = add_rms_norm(torch.full((2, 9), 1e30), torch.full((2, 9), 2e30), 9)[0]
    torch.testing.assert_close(big, torch.ones(2, 9))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_do_not_know_their_batch(dtype, threads, task_order):
    for n in (5, 700, 5000):
        x, weight = misaligned(64, n, dtype, 0), torch.randn(n)
        expected = rms_norm(x, n, weight)
        for i in (0, 31, 63):
            assert same_bits(rms_norm(x[i : i + 1], n, weight), expected[i : i + 1])
        for count in (1, 2, 3, 5, 7):
            threads(count)
            for seed in (0, 3, 11):
                task_order(seed)
                assert same_bits(rms_norm(x, n, weight), expected)


def test_large_results_bypass_the_caches_with_the_same_bits():
    x, weight = torch.randn(8200, 1031), torch.randn(1031)
    out = rms_norm(x, 1031, weight, out=poisoned(x))
    assert same_bits(out[:50], rms_norm(x[:50], 1031, weight)) and same_bits(
        out[-50:], rms_norm(x[-50:], 1031, weight)
    )
    half = x.repeat(2, 1).half()
    out = rms_norm(half, 1031, weight, out=poisoned(half))
    assert same_bits(out[-50:], rms_norm(half[-50:], 1031, weight))


@pytest.mark.slow
def test_more_than_2_31_elements():
    x = torch.randn(70001, dtype=torch.bfloat16).expand(33000, 70001)
    out = rms_norm(x, 70001)
    assert out.numel() > 2**31 and same_bits(out[-1], rms_norm(x[0], 70001))


ERRORS = {
    r"normalized_shape .* got \[4\]": lambda x: rms_norm(x, 4),
    r"weight must have .* got \[4\]": lambda x: rms_norm(x, 6, torch.ones(4)),
    "eps must be 0 or more": lambda x: rms_norm(x, 6, eps=-1e-6),
    "residual must be one of": lambda x: add_rms_norm(x, x.long(), 6),
    "sum_out must be a tensor": lambda x: add_rms_norm(x, x, 6, sum_out=x.half()),
    "backend='triton' cannot run": lambda x: add_rms_norm(x, x, 6, backend="triton"),
}


@pytest.mark.parametrize("message", ERRORS)
def test_bad_input(message):
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        ERRORS[message](torch.randn(4, 6))


def test_explain():
    x = torch.randn(4, 6)
    assert explain(rms_norm, x, 6).kernel == "cpu" and explain(add_rms_norm, x, x, 6, x[0]).kernel == "cpu"
    assert "sum_dtype is float64" in str(explain(add_rms_norm, x, x, 6, sum_dtype=torch.float64))
