"""layer_norm and add_layer_norm, forward: lengths, layouts, dtypes, large means, extremes, and bits."""

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
from fastattn.rows import add_layer_norm, explain, layer_norm

INF = float("inf")


def affine(n, dtype):
    return {"weight": torch.randn(n).to(dtype), "bias": torch.randn(n).to(dtype)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths(isa, dtype):
    for n in LENGTHS:
        check_norm("layer_norm", misaligned(3, n, dtype, offset=n % 17), n, **affine(n, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_length(dtype):
    for n in range(1, 4097):
        check_norm("layer_norm", misaligned(2, n, dtype, offset=n % 16), n, **affine(n, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", LONG)
def test_long_rows(n, dtype):
    check_norm("layer_norm", misaligned(2, n, dtype, offset=1), n, **affine(n, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alignment_changes_nothing(isa, dtype):
    for n in (1, 7, 31, 33, 130):
        weights = affine(n, dtype)
        first = layer_norm(misaligned(3, n, dtype, 0), n, **weights)
        for offset in range(1, 33):
            x = misaligned(3, n, dtype, offset)
            out = torch.empty(offset + x.numel(), dtype=dtype)[offset:].view_as(x)
            assert same_bits(layer_norm(x, n, out=out, **weights), first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights(isa, dtype):
    x = misaligned(5, 77, dtype, 0)
    for kind in DTYPES:
        both = affine(77, kind)
        for names in ((), ("weight",), ("bias",), ("weight", "bias")):
            for offset in (0.0, 1.0):
                check_norm("layer_norm", x, 77, weight_offset=offset, **{n: both[n] for n in names})
    strided = torch.randn(77, 2)[:, 0]
    check_norm("layer_norm", x, 77, weight=strided)


def test_shapes_and_layouts():
    x = torch.randn(4, 6, 10, 14)
    for view in (
        x,
        x.transpose(0, 1),
        x[:, ::2],
        x[:1].expand_as(x),
        x[:, :, 2:5],
        x.permute(3, 2, 1, 0),
        x[..., 1:],
    ):
        for dims in (1, 2, 4):
            shape = view.shape[-dims:]
            check_norm("layer_norm", view, shape, weight=torch.randn(shape), bias=torch.randn(shape))
            assert layer_norm(view, shape).is_contiguous()
    out = torch.empty(4, 6, 14, 10).transpose(2, 3)
    assert same_bits(layer_norm(x, 14, out=out), layer_norm(x, 14)) and out.stride(3) == 10
    for shape in ((0, 5), (3, 0), (0,), (2, 0, 3)):
        assert layer_norm(torch.empty(shape), shape[-1]).shape == shape


@pytest.mark.parametrize("mean", [1e4, 1e5, 1e6, -1e6])
@pytest.mark.parametrize("n", [5, 130, 1024, 5000])
def test_large_means_do_not_cancel(isa, mean, n):
    x = torch.randn(4, n) + mean
    check_norm("layer_norm", x, n)
    check_norm("layer_norm", x.double().add(0.3).float(), n, **affine(n, torch.float32))


def test_extremes(isa):
    for scale in (1e30, 3e37, 1e-30):
        for n in (1, 2, 65, 5000):
            x = torch.randn(3, n).clamp(-3, 3) * scale
            eps = 0.0 if scale < 1 and n > 1 else 1e-5
            exact = reference.layer_norm(x.double(), n, eps=eps)
            assert_right(layer_norm(x, n, eps=eps), exact, what=f"{scale} {n}")
    for value in (0.0, 1.0, 1e30, 3e38, -1e-40, 1e6 + 0.3):
        for n in (1, 3, 70):
            assert (layer_norm(torch.full((2, n), value), n).abs() < 1e-4).all(), (value, n)
    x = torch.randn(4, 50)
    x[0, 3], x[1, 4] = INF, float("nan")
    result = layer_norm(x, 50)
    assert result[:2].isnan().all() and same_bits(result[2:], layer_norm(x[2:], 50))


def test_width_one(isa):
    weight, bias = torch.tensor([3.0]), torch.tensor([0.25])
    for x in (torch.randn(7, 1), torch.full((2, 1), 1e30), torch.tensor([[1e6 + 0.5]])):
        assert torch.equal(layer_norm(x, 1, weight, bias), bias.expand_as(x))


def test_eps():
    x = torch.randn(3, 40) * 1e-3
    for eps in (0.0, 1e-12, 1e-5, 1.0):
        check_norm("layer_norm", x, 40, eps=eps)
    assert layer_norm(torch.ones(2, 5), 5, eps=0.0).isnan().all()  # 0 / 0, as in torch


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add(isa, dtype):
    for kind, sum_dtype in itertools.product(DTYPES, (None, *DTYPES)):
        for n in (1, 33, 200):
            x, residual = misaligned(4, n, dtype, 3), misaligned(4, n, kind, 1, seed=9)
            check_add_norm("layer_norm", x, residual, n, sum_dtype=sum_dtype, **affine(n, torch.float32))
    check_add_norm("layer_norm", x, residual, n, **affine(n, dtype), weight_offset=1.0)
    x, residual = torch.randn(6, 3, 40).to(dtype).transpose(0, 1), torch.randn(3, 6, 40).to(dtype)[:, ::1]
    check_add_norm("layer_norm", x, residual, 40)
    check_add_norm("layer_norm", x, residual.expand_as(x), (6, 40))


def test_add_in_place_and_large():
    x, residual, weight = torch.randn(40, 300), torch.randn(40, 300), torch.randn(300)
    y, total = add_layer_norm(x, residual, 300, weight)
    a, b = x.clone(), residual.clone()
    add_layer_norm(a, b, 300, weight, out=a, sum_out=b)
    assert same_bits(a, y) and same_bits(b, total)
    x, residual = (
        torch.randn(8200, 1031),
        torch.randn(8200, 1031),
    )  # past 32 MB, no row aligned as the one before
    weight, bias = torch.randn(1031), torch.randn(1031)
    out, sum_out = poisoned(x), poisoned(x)
    add_layer_norm(x, residual, 1031, weight, bias, out=out, sum_out=sum_out)
    assert torch.equal(sum_out, x + residual)
    for part in (slice(0, 40), slice(-40, None)):
        assert same_bits(out[part], layer_norm(sum_out[part], 1031, weight, bias))
    half = x.bfloat16(), residual.bfloat16()
    y, total = add_layer_norm(*(torch.cat((t, t)) for t in half), 1031, weight, bias)
    assert torch.equal(total[:8200], half[0] + half[1])
    assert same_bits(y[8200:8300], layer_norm(total[8200:8300], 1031, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_do_not_know_their_batch(dtype, threads, task_order):
    for n in (5, 700, 5000):
        x, weights = misaligned(64, n, dtype, 0), affine(n, dtype)
        expected, y = layer_norm(x, n, **weights), add_layer_norm(x, x, n, **weights)[0]
        for i in (0, 31, 63):
            assert same_bits(layer_norm(x[i : i + 1], n, **weights), expected[i : i + 1])
        assert same_bits(layer_norm(x, n, **weights)[:-1], layer_norm(x[:-1], n, **weights))
        for count in (1, 2, 3, 5, 7):
            threads(count)
            for seed in (0, 3, 11):
                task_order(seed)
                assert same_bits(layer_norm(x, n, **weights), expected)
                assert same_bits(add_layer_norm(x, x, n, **weights)[0], y)


def test_float64_and_other_devices_go_to_the_reference():
    x = torch.randn(3, 8)
    torch.testing.assert_close(layer_norm(x.double(), 8), F.layer_norm(x.double(), [8]))
    assert layer_norm(x, 8, x[0].double()).dtype == torch.float32
    choice = explain(layer_norm, x, 8, x[0].double())
    assert choice.kernel == "reference" and "weight is float64" in str(choice)
    assert "copied once" in str(explain(layer_norm, x.t(), 3))
    assert explain(add_layer_norm, x, x, [8], x[0], x[0]).kernel == "cpu"


ERRORS = {
    "x must be a tensor": lambda x: layer_norm(None, 6),
    "x must be one of .* got int64": lambda x: layer_norm(torch.arange(6), 6),
    r"normalized_shape must be how the shape of x ends, \[4, 6\], .* got \[4\]": lambda x: layer_norm(x, 4),
    r"normalized_shape .* got \[\]": lambda x: layer_norm(x, ()),
    r"normalized_shape .* got \[1, 4, 6\]": lambda x: layer_norm(x, (1, 4, 6)),
    "normalized_shape must be an int or a sequence": lambda x: layer_norm(x, 6.0),
    r"weight must have the shape of normalized_shape, \[6\], got \[4\]": lambda x: layer_norm(
        x, 6, torch.ones(4)
    ),
    "weight must be one of .* got int64": lambda x: layer_norm(x, 6, torch.ones(6).long()),
    r"bias must have .* got \[6, 1\]": lambda x: layer_norm(x, 6, None, torch.ones(6, 1)),
    "weight must be on cpu": lambda x: layer_norm(x, 6, torch.ones(6, device="meta")),
    "eps must be 0 or more, got -1": lambda x: layer_norm(x, 6, eps=-1.0),
    "eps must be a number, got NoneType": lambda x: layer_norm(x, 6, eps=None),
    "eps must be finite": lambda x: layer_norm(x, 6, eps=float("nan")),
    "weight_offset must be a number": lambda x: layer_norm(x, 6, weight_offset="1"),
    r"residual must have the shape of x, \[4, 6\], got \[6\]": lambda x: add_layer_norm(x, x[0], 6),
    "residual must be a tensor": lambda x: add_layer_norm(x, None, 6),
    "sum_dtype must be": lambda x: add_layer_norm(x, x, 6, sum_dtype=torch.int8),
    r"out must be a tensor \[4, 6\] of float32 .* got bfloat16": lambda x: layer_norm(x, 6, out=x.bfloat16()),
    "sum_out must be a tensor .* of bfloat16": lambda x: add_layer_norm(x, x.bfloat16(), 6, sum_out=x),
    "out must not share memory with sum_out": lambda x: add_layer_norm(
        x.clone(), x.clone(), 6, out=x, sum_out=x
    ),
    "out must not share memory with weight": lambda x: layer_norm(torch.ones(1, 6), 6, x[0], out=x[:1]),
    "out must not share memory with x unless it is all of it": lambda x: layer_norm(x[1:], 6, out=x[:-1]),
    "out must not share memory with x unless": lambda x: layer_norm(x, 6, out=x.as_strided((4, 6), (1, 4))),
    "backend must be": lambda x: layer_norm(x, 6, backend="amx"),
    "out= does not support automatic": lambda x: layer_norm(x.requires_grad_(), 6, out=torch.empty(4, 6)),
    "backend='cuda' cannot run": lambda x: layer_norm(x, 6, backend="cuda"),
}


@pytest.mark.parametrize("message", ERRORS)
def test_bad_input(message):
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        ERRORS[message](torch.randn(4, 6))
