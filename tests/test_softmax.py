"""softmax, forward: every row length and layout, masks and biases, extremes, bits that depend on nothing else."""

import pytest
import torch
from row_checks import DTYPES, LENGTHS, LONG, assert_right, misaligned, poisoned, same_bits

import fastattn.rows as rows
from fastattn import reference
from fastattn.rows import explain, softmax

INF = float("inf")


def check(x, dim=-1, **arguments):
    """Against float64 and, where torch has the call, against torch."""
    out = poisoned(x, arguments.get("dtype"))
    result = softmax(x, dim, out=out, **arguments)
    assert result is out
    doubled = {n: t.double() if n == "bias" else t for n, t in arguments.items() if n != "dtype"}
    exact = reference.softmax(x.double(), dim, **doubled)
    theirs = None
    if set(arguments) <= {"dtype"}:
        theirs = torch.softmax(x, dim, **arguments)
    assert_right(out, exact, theirs, f"{list(x.shape)} {x.dtype} {list(arguments)}")
    assert same_bits(out, softmax(x, dim, **arguments))
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths(isa, dtype):
    for n in LENGTHS:
        check(3 * misaligned(3, n, dtype, offset=n % 17))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_length(dtype):
    for n in range(1, 4097):
        check(misaligned(2, n, dtype, offset=n % 16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", LONG)
def test_long_rows(n, dtype):
    check(3 * misaligned(2, n, dtype, offset=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alignment_changes_nothing(isa, dtype):
    for n in (1, 7, 31, 33, 130):
        first = softmax(misaligned(3, n, dtype, 0))
        for offset in range(1, 33):
            x = misaligned(3, n, dtype, offset)
            out = torch.empty(offset + x.numel(), dtype=dtype)[offset:].view_as(x)
            assert same_bits(softmax(x, out=out), first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape, dim", [((5, 33, 7), 1), ((40, 3), 0), ((2, 130, 4, 9), 1), ((3, 1, 5), 1), ((17,), 0)]
)
def test_other_dimensions(isa, shape, dim, dtype):
    check(torch.randn(shape).to(dtype), dim)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype):
    x = torch.randn(4, 6, 10, 14).to(dtype)
    for view in (x.transpose(1, 2), x.permute(3, 0, 2, 1), x[:, ::2, :, 1:], x[:1].expand_as(x), x[..., ::3]):
        for dim in range(4):
            check(view, dim)
    assert softmax(x.transpose(0, 3)).is_contiguous()
    out = torch.empty(14, 10, 6, 4, dtype=dtype).permute(3, 2, 1, 0)
    assert same_bits(softmax(x, 2, out=out), softmax(x, 2))


def test_empty_and_scalar():
    for shape in ((0,), (0, 5), (5, 0), (2, 0, 3)):
        assert softmax(torch.empty(shape)).shape == shape
        assert softmax(torch.empty(shape), 0).shape == shape
    assert softmax(torch.tensor(3.0), 0) == 1
    assert softmax(torch.tensor(3.0), 0, mask=torch.tensor(False)) == 0


def test_dtype():
    for dtype in DTYPES[1:]:
        x = misaligned(3, 200, dtype, 3)
        check(x, dtype=torch.float32)
        check(torch.randn(9, 4, 3).to(dtype), 0, dtype=torch.float32)
        wide = x.float() + 0.001
        assert same_bits(softmax(wide, dtype=dtype), softmax(wide.to(dtype)))
    assert softmax(torch.arange(4), dtype=torch.float32).dtype == torch.float32
    assert softmax(x, dtype=torch.float64).dtype == torch.float64


MASKS = {
    "full": lambda B, H, S, N: torch.rand(B, H, S, N) < 0.5,
    "keys": lambda B, H, S, N: torch.rand(B, 1, 1, N) < 0.7,
    "rows": lambda B, H, S, N: torch.rand(H, S, 1) < 0.5,
    "square": lambda B, H, S, N: torch.rand(S, N) < 0.5,
    "sliced": lambda B, H, S, N: (torch.rand(B, H, S, 2 * N + 1) < 0.5)[..., 1::2],
    "expanded": lambda B, H, S, N: (torch.rand(B, 1, 1, N) < 0.5).expand(B, H, S, N),
    "nothing": lambda B, H, S, N: torch.zeros(1, 1, 1, 1, dtype=torch.bool),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("N", [3, 40, 133])
def test_masks(isa, kind, N, dtype):
    B, H, S = 2, 3, 5
    x, mask = torch.randn(B, H, S, N).to(dtype), MASKS[kind](B, H, S, N)
    out = check(x, mask=mask)
    seen = mask.expand_as(x)
    assert (out[~seen] == 0).all() and (out[seen] > 0).all()
    hidden = torch.where(seen, x, torch.tensor(float("nan"), dtype=dtype))
    assert same_bits(softmax(hidden, mask=mask), out)
    check(x, causal=True, mask=mask, scale=0.3)
    check(x.transpose(0, 2).contiguous().transpose(0, 2), 1, mask=mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fp32", [False, True])
def test_bias(isa, dtype, fp32):
    kind = torch.float32 if fp32 else dtype
    x = torch.randn(2, 3, 5, 70).to(dtype)
    for shape in ((2, 3, 5, 70), (3, 1, 70), (5, 70), (70,), (2, 1, 5, 1), (1,)):
        bias = torch.randn(shape).to(kind)
        check(x, bias=bias, scale=-1.7)
        bias = torch.where(torch.rand(shape) < 0.4, -INF, bias)
        out = check(x, bias=bias, mask=torch.rand(5, 70) < 0.8)
        assert (out[(bias == -INF).expand_as(out)] == 0).all()
        assert same_bits(
            softmax(torch.where(bias == -INF, float("nan"), x).to(dtype), bias=bias), softmax(x, bias=bias)
        )


@pytest.mark.parametrize("shape", [(5, 5), (3, 4, 9), (2, 9, 4), (1, 1), (1, 2, 20, 2100)])
def test_causal(isa, shape):
    x = torch.randn(shape)
    out = check(x, causal=True)
    assert (out[~torch.ones(shape[-2:], dtype=torch.bool).tril().expand(shape)] == 0).all()
    check(x.transpose(-1, -2), causal=True)


def test_long_masked_rows():
    x = torch.randn(3, 10001)
    mask = torch.zeros(3, 10001, dtype=torch.bool)
    mask[0, 9000:], mask[1, ::7] = True, True
    out = check(x, mask=mask, scale=2.5)
    assert (out[2] == 0).all()


def test_rows_without_a_finite_number(isa):
    x = torch.full((3, 70), -INF)
    x[1, 3] = 0.5
    assert torch.equal(softmax(x).isnan(), torch.tensor([True, False, True])[:, None].expand(3, 70))
    torch.testing.assert_close(softmax(x), torch.softmax(x, -1), equal_nan=True)
    mask = torch.zeros(3, 70, dtype=torch.bool)
    assert (softmax(x, mask=mask) == 0).all()
    mask[0, 5] = True  # one visible entry, and it is -inf
    assert softmax(x, mask=mask)[0].isnan().all() and (softmax(x, mask=mask)[1:] == 0).all()
    assert (softmax(torch.randn(3, 70), bias=torch.full((70,), -INF)) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_numbers(isa, dtype):
    lowest = torch.finfo(dtype).min
    for values in (
        [INF, 0, 1],
        [float("nan"), 0, 1],
        [-INF, 0, 1],
        [lowest, lowest, lowest],
        [lowest, 0, -lowest],
    ):
        x = torch.tensor(values, dtype=dtype).repeat(2, 11)
        ours, theirs = softmax(x), torch.softmax(x, -1)
        assert torch.equal(ours.isnan(), theirs.isnan())
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_shift_invariance(isa):
    x = torch.randint(-20, 20, (4, 300)).float()
    for shift in (1e4, -1e7):
        torch.testing.assert_close(softmax(x + shift), softmax(x), rtol=1e-6, atol=0)
    check(torch.randn(3, 65) * 1e30)
    check(torch.randn(3, 65) * 1e-30)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_do_not_know_their_batch(dtype, threads, task_order):
    for n in (5, 700, 5000):
        x = misaligned(64, n, dtype, 0)
        expected = softmax(x)
        for i in (0, 31, 63):
            assert same_bits(softmax(x[i : i + 1]), expected[i : i + 1])
        for count in (1, 2, 3, 5, 7):
            threads(count)
            for seed in (0, 3, 11):
                task_order(seed)
                assert same_bits(softmax(x), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_short_rows_side_by_side(isa, dtype):
    """The same bits as alone, and as on the way of masked rows, whatever the rows beside hold."""
    for n in range(1, 133):
        x = 5 * misaligned(11, n, dtype, offset=n % 16)
        x[2], x[5, 0], x[7, -1], x[8, n // 2] = -INF, float("nan"), INF, torch.finfo(dtype).min
        together = softmax(x)
        assert same_bits(together, softmax(x, mask=torch.ones(n, dtype=torch.bool)))
        for i in range(11):
            assert same_bits(together[i], softmax(x[i : i + 1])[0])
        assert softmax(x, out=x) is x and same_bits(x, together)


def test_large_results_bypass_the_caches_with_the_same_bits():
    x = torch.randn(2100, 4099)  # 34 MB, no row aligned as the one before it
    out = poisoned(x)
    softmax(x, out=out)
    assert same_bits(out[:50], softmax(x[:50])) and same_bits(out[-50:], softmax(x[-50:]))
    assert same_bits(softmax(x), out)
    assert softmax(x, out=x) is x and same_bits(x, out)
    x = torch.randn(70000, 61)
    assert same_bits(softmax(x)[-50:], softmax(x[-50:]))


@pytest.mark.slow
def test_more_than_2_31_elements():
    x = torch.randn(70001, dtype=torch.bfloat16).expand(33000, 70001)
    out = softmax(x)
    assert out.numel() > 2**31 and same_bits(out[-1], softmax(x[0]))


def test_huge_strides():
    flat = torch.empty(2**31 + 100, dtype=torch.bfloat16)
    x = flat.as_strided((2, 50), (2**31, 1))
    x.copy_(torch.randn(2, 50))
    assert same_bits(softmax(x), softmax(x.contiguous()))


ERRORS = {
    "x must be a tensor": lambda x: softmax([1.0]),
    "x must be one of .* got int64": lambda x: softmax(torch.arange(3)),
    "x must be a strided": lambda x: softmax(x.to_sparse()),
    "dim must be an int, got float": lambda x: softmax(x, 1.0),
    r"dim must be in \[-2, 1\] .* got 2": lambda x: softmax(x, 2),
    "dtype must be": lambda x: softmax(x, dtype=torch.int32),
    "mask must be a tensor": lambda x: softmax(x, mask=True),
    "mask must be one of bool, got float32": lambda x: softmax(x, mask=x),
    r"mask must broadcast to the shape of x, \[4, 6\], got \[5\]": lambda x: softmax(
        x, mask=torch.ones(5).bool()
    ),
    r"mask must .* got \[1, 4, 6\]": lambda x: softmax(x, mask=torch.ones(1, 4, 6).bool()),
    "bias must be one of float32, got float64": lambda x: softmax(x, bias=x.double()),
    "bias must be one of bfloat16, float32, got float16": lambda x: softmax(x.bfloat16(), bias=x.half()),
    r"bias must broadcast .* got \[4, 5\]": lambda x: softmax(x, bias=torch.ones(4, 5)),
    "bias must be on cpu": lambda x: softmax(x, bias=torch.ones(6, device="meta")),
    "scale must be a number": lambda x: softmax(x, scale="1"),
    "scale must be finite": lambda x: softmax(x, scale=INF),
    "causal=True needs dim": lambda x: softmax(x, 0, causal=True),
    "causal=True needs": lambda x: softmax(x[0], causal=True),
    "out must be a tensor .* got list": lambda x: softmax(x, out=[]),
    r"out must be a tensor \[4, 6\] of float32": lambda x: softmax(x, out=torch.empty(6, 4)),
    "out must be a tensor .* got bfloat16": lambda x: softmax(x, out=torch.empty(4, 6, dtype=torch.bfloat16)),
    "out must not be expanded": lambda x: softmax(x, out=torch.empty(6).expand(4, 6)),
    "out must not share memory with x": lambda x: softmax(x[1:], out=x[:-1]),
    "out must not share memory with bias": lambda x: softmax(torch.ones(4, 6), bias=x, out=x),
    "backend must be": lambda x: softmax(x, backend="gpu"),
    "out= does not support automatic": lambda x: softmax(x.requires_grad_(), out=torch.empty(4, 6)),
    "backend='triton' cannot run": lambda x: softmax(x, backend="triton"),
    "backend='cpu' cannot run this call: x is float64": lambda x: softmax(x.double(), backend="cpu"),
}


@pytest.mark.parametrize("message", ERRORS)
def test_bad_input(message):
    with pytest.raises((TypeError, ValueError, IndexError, RuntimeError), match=message):
        ERRORS[message](torch.randn(4, 6))


def test_explain():
    x = torch.randn(4, 6)
    assert explain(softmax, x).kernel == "cpu"
    choice = explain(softmax, x.double(), causal=True)
    assert choice.kernel == "reference" and "cpu" in dict(choice.refusals) and "float64" in str(choice)
    assert explain(softmax, x, backend="reference").kernel == "reference"
    with pytest.raises(TypeError, match="explain knows"):
        explain(torch.softmax, x)
    assert rows.softmax(x, backend="reference").shape == x.shape
