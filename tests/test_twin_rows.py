"""The CUDA kernels of softmax and the norms, executed on the host twin through the bindings of the CUDA library.

Every call runs under 8 schedules, whose bits have to be the same; what is compared with the reference is one of them.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from row_checks import DTYPES, assert_right, doubled, misaligned, poisoned, same_bits
from twin import build, cuda_library

from fastattn import reference

pytestmark = pytest.mark.skipif(build.missing is not None, reason=str(build.missing))

ops = torch.ops.fastattn_cuda
SEEDS = range(8)
LAYER, RMS = False, True

# Either side of what 8 lanes, a warp and a block hold; primes; a width that no pack divides and one that packs do.
WIDTHS = [1, 3, 8, 61, 64, 128, 129, 512, 1000, 1024, 1025, 2053]


def forward_regime(width):
    return next(
        (n for n, most in (("lanes", 128), ("warp", 1024), ("block", 16384)) if width <= most), "looped"
    )


@pytest.fixture(scope="module", autouse=True)
def library():
    return cuda_library.load()


def twin(function, *arguments, regime=None, seeds=SEEDS):
    """The op's result, the same bits under every schedule; a kernel whose name has `regime` was the first to run."""
    first = None
    for seed in seeds:
        result, names = cuda_library.run(seed, function, *arguments)
        tensors = [t.clone() for t in (result if isinstance(result, tuple) else (result,))]
        if first is None:
            first = tensors
            assert regime is None or regime in names, (regime, names)
        for a, b in zip(tensors, first):
            assert same_bits(a, b), f"seed {seed}"
    return first if len(first) > 1 else first[0]


def softmax(x, dim=-1, mask=None, bias=None, scale=1.0, causal=False, out_fp32=False, **how):
    return twin(ops.softmax_fwd, x, dim % x.dim(), mask, bias, scale, causal, out_fp32, **how)


def check_softmax(x, dim=-1, mask=None, bias=None, scale=1.0, causal=False, out_fp32=False, **how):
    y = softmax(x, dim, mask, bias, scale, causal, out_fp32, **how)
    exact = reference.softmax(x.double(), dim, mask=mask, bias=bias, scale=scale, causal=causal)
    plain = mask is None and bias is None and scale == 1.0 and not causal and not out_fp32
    theirs = torch.softmax(x, dim) if plain else None
    assert_right(y, exact, theirs, f"{x.dtype} {list(x.shape)} {x.stride()}")
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax_widths(dtype):
    for width in WIDTHS:
        x = misaligned(3, width, dtype, offset=width % 3)
        y = check_softmax(x, regime=f"softmax {forward_regime(width)}")
        aligned = softmax(x.clone(), seeds=[0])
        assert same_bits(y, aligned), "alignment changes a result"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax_terms(dtype):
    for width in (5, 96, 200, 1032, 1511):
        x = misaligned(6, width, dtype, offset=0).view(2, 3, width)
        mask = torch.rand(3, width) < 0.7
        mask[1] = False
        biases = torch.randn(2, 1, width), torch.randn(width).to(dtype)
        biases[0][1, 0, ::2] = -math.inf
        for bias in biases:
            y = check_softmax(x, mask=mask, bias=bias, scale=0.3, out_fp32=True)
            assert (y[:, 1] == 0).all() and (y[:, ~mask] == 0).all()
        check_softmax(x, mask=mask[:1].expand(3, width))  # a stride of 0
        square = torch.randn(width % 37 + 5, width).to(dtype)
        check_softmax(
            square, causal=True, mask=torch.rand(1, width) < 0.9, regime=f"softmax {forward_regime(width)}"
        )


def test_softmax_fills_rows_as_torch_does():
    lowest = torch.finfo(torch.float32).min
    for width in (7, 300, 1100):
        x = torch.randn(6, width)
        x[0], x[1, 1:], x[2, 0], x[3, 0] = -math.inf, lowest, math.nan, math.inf
        mask = torch.ones(6, width, dtype=torch.bool)
        mask[4] = False
        y = softmax(x, mask=mask)
        want = torch.where(mask, torch.softmax(x, -1), 0.0)
        assert (y.isnan() == want.isnan()).all() and want[[0, 2, 3]].isnan().all()
        assert torch.allclose(y, want, equal_nan=True, atol=1e-6)
        x[5, :] = -math.inf
        x[5, 0] = 3.0
        mask[5, 0] = False
        assert softmax(x, mask=mask)[5].isnan().all()  # visible, and all -inf
        bias = torch.full((width,), -math.inf)
        assert (softmax(x, bias=bias) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax_over_any_dimension(dtype):
    x = torch.randn(3, 19, 37).to(dtype)
    for dim, what in ((0, x), (1, x), (-1, x.transpose(0, 2)), (2, x.transpose(1, 2)), (1, x[:, ::3])):
        mask = torch.rand(what.shape).movedim(dim, -1).gt(0.3).movedim(-1, dim)
        mask = mask.movedim(dim, -1).contiguous().movedim(-1, dim)
        bias = torch.randn(what.shape[dim], *[1] * (what.dim() - dim % 3 - 1))
        check_softmax(what, dim, mask=mask, bias=bias, scale=-1.5, regime="softmax columns")
    empty = torch.zeros(3, 19, 37, dtype=torch.bool).movedim(1, -1).contiguous().movedim(-1, 1)
    assert (softmax(x, 1, mask=empty) == 0).all()


def test_softmax_in_place_and_of_nothing():
    for width in (100, 1500):
        x = torch.randn(4, width)
        want = softmax(x)
        for seed in SEEDS:
            y = x.clone()
            cuda_library.run(seed, ops.softmax_out, y, 1, None, None, 1.0, False, y)
            assert same_bits(y, want)
    for shape in ((0, 5), (5, 0)):
        assert softmax(torch.zeros(shape), seeds=[0]).shape == shape
    # Strided rows, and a row alone: the same bits as in its batch.
    x = torch.randn(5, 1030).to(torch.bfloat16)[:, :1024]
    assert not x.is_contiguous() and same_bits(softmax(x)[3:4], softmax(x[3:4]))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_softmax_long_rows(dtype):
    width = 16385
    x = torch.randn(2, width).to(dtype)
    x[0, 9000] = 30  # a maximum that comes late
    check_softmax(x, regime="softmax looped")
    mask = torch.rand(width) < 0.5
    check_softmax(x[:, :16896], mask=mask, bias=torch.randn(width), scale=2.0)
    check_softmax(x, causal=True)
    assert (softmax(x, mask=torch.zeros(1, width, dtype=torch.bool)) == 0).all()


def test_rows_past_two_to_the_31():
    stride = 2**31 + 8
    x = torch.empty(stride + 64, dtype=torch.float16).as_strided((2, 64), (stride, 1))
    x.copy_(torch.randn(2, 64))
    check_softmax(x, seeds=[0])
    assert_right(norm(x, seeds=[0])[0], F.layer_norm(x.double(), [64]))


# --- backward of softmax


def backward_regime(width, dtype):
    return next(
        (n for n, most in (("lanes", 128), ("warp", 512), ("block", 16384)) if width <= most), "looped"
    )


def check_softmax_backward(x, dim=-1, bias=None, scale=1.0, out_fp32=False, dy=None, **how):
    y = ops.softmax_fwd(x, dim % x.dim(), None, bias, scale, False, out_fp32)
    dy = torch.randn(x.shape).to(y.dtype) if dy is None else dy
    needs = [True, bias is not None]
    dx, dbias = twin(ops.softmax_bwd, dy, y, dim % x.dim(), bias, scale, x.dtype, needs, **how)
    ds = y.double() * (dy.double() - (y.double() * dy.double()).sum(dim, keepdim=True))
    assert_right(dx, scale * ds, what=f"dx {x.dtype} {list(x.shape)}")
    if bias is not None:
        at = dim % x.dim() - x.dim() + bias.dim()
        exact = ds.sum_to_size(bias.shape).movedim(at, -1).reshape(dbias.shape)
        assert_right(
            dbias, exact, what=f"dbias {x.dtype} {list(bias.shape)}", magnitude=ds.abs().max().item() * 4
        )
    return dx


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax_backward_widths(dtype):
    for width in (1, 7, 128, 129, 512, 515, 1024):
        x = misaligned(5, width, dtype, offset=width % 5)
        check_softmax_backward(x, scale=0.7, regime=f"softmax_backward {backward_regime(width, dtype)}")
        check_softmax_backward(x, out_fp32=True)
    check_softmax_backward(torch.randn(1, 16390).to(dtype), regime="softmax_backward looped")
    check_softmax_backward(torch.randn(3, 40, 21).to(dtype), 1, regime="softmax_backward columns")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax_backward_of_a_bias(dtype):
    x = torch.randn(3, 4, 9, 130).to(dtype)
    for shape in ((130,), (4, 1, 130), (3, 1, 1, 130), (1, 4, 9, 130), (3, 4, 9, 130)):
        for kind in (dtype, torch.float32):
            check_softmax_backward(x, bias=torch.randn(shape).to(kind), scale=0.5)
    check_softmax_backward(x, bias=torch.randn(130), regime="softmax_backward bias")
    check_softmax_backward(x, 2, bias=torch.randn(9, 1))


# --- the norms


def norm(x, weight=None, bias=None, eps=1e-5, offset=0.0, rms=LAYER, dims=1, **how):
    return twin(ops.norm_fwd, x, dims, weight, bias, eps, offset, rms, **how)


def check_norm(x, weight=None, bias=None, eps=1e-5, offset=0.0, rms=LAYER, **how):
    y, stats = norm(x, weight, bias, eps, offset, rms, **how)
    n = x.shape[-1:]
    d = doubled({"x": x, "weight": weight, "bias": bias})
    if rms:
        exact = reference.rms_norm(d["x"], n, d["weight"], eps, weight_offset=offset)
    else:
        exact = reference.layer_norm(d["x"], n, d["weight"], d["bias"], eps, weight_offset=offset)
    theirs = None
    if offset == 0 and all(t is None or t.dtype == x.dtype for t in (weight, bias)):
        theirs = F.rms_norm(x, n, weight, eps) if rms else F.layer_norm(x, n, weight, bias, eps)
    assert_right(y, exact, theirs, f"{x.dtype} {list(x.shape)} rms {rms}")
    return y, stats


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_widths(dtype):
    for i, width in enumerate(WIDTHS):
        x = misaligned(3, width, dtype, offset=width % 3)
        kinds = (dtype, torch.float32)
        weight, bias = (torch.randn(width).to(kinds[(i + k) % 2]) for k in range(2))
        y, stats = check_norm(x, weight, bias, regime=f"norm {forward_regime(width)}")
        check_norm(x, weight, eps=1e-6, offset=1.0, rms=RMS)
        other, also = norm(x.clone(), weight, bias, seeds=[0])
        assert same_bits(y, other) and same_bits(stats, also), "alignment changes a result"
        mean = x.double().mean(-1)
        assert_right(stats[1] + stats[2], mean, magnitude=mean.abs().max().item() + 1)


@pytest.mark.parametrize("rms", [LAYER, RMS], ids=["layer", "rms"])
def test_norm_statistics_survive(rms):
    for width in (90, 768, 3000):
        for mean, deviation in (
            (1e6, 1.0),
            (-3e4, 1e-2),
            (1e30, 1e27),
            (0.0, 1e-25),
            (0.0, 1e25),
            (1e-38, 1e-39),
        ):
            x = torch.randn(3, width) * deviation + mean
            check_norm(x, torch.randn(width), eps=1e-5 if deviation == 1.0 else 0.0, rms=rms, seeds=[0])
        check_norm(torch.full((2, width), 5.0), eps=1e-12, rms=rms, seeds=[1])
        x = torch.randn(4, width)
        x[1, 3], x[2, 2] = math.inf, math.nan
        y, _ = norm(x, rms=rms)
        assert y[2].isnan().all() and y[[0, 3]].isfinite().all()
    x = torch.randn(1, 16400) * 3 + 1e6
    x[:, :100] += 1e3
    check_norm(x, rms=rms, regime="norm looped")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_norm(dtype):
    for i, width in enumerate((64, 77, 768, 1028, 1301)):
        for residual_dtype in (dtype, torch.float32):
            x, residual = misaligned(4, width, dtype, i), torch.randn(4, width).to(residual_dtype)
            weight, bias = torch.randn(width), torch.randn(width).to(dtype)
            for rms, sum_dtype in ((LAYER, residual_dtype), (RMS, dtype)):
                given = (1, weight, None if rms else bias, 1e-5, 0.5, rms)
                y, total, stats = twin(ops.add_norm_fwd, x, residual, *given, sum_dtype)
                assert same_bits(total, (x.float() + residual.float()).to(sum_dtype))
                alone, of_sum = norm(total.to(x.dtype), *given[1:], seeds=[0])
                if sum_dtype == dtype:
                    assert same_bits(y, alone) and same_bits(stats, of_sum)
                spec = reference.rms_norm if rms else reference.layer_norm
                terms = (weight.double(),) if rms else (weight.double(), bias.double())
                assert_right(y, spec(total.double(), (width,), *terms, eps=1e-5, weight_offset=0.5))
    # Results over their inputs: of a stream of residuals updated in place.
    x, residual = torch.randn(3, 1300).to(dtype), torch.randn(3, 1300).to(dtype)
    given = (1, None, None, 1e-5, 0.0, RMS)
    want = ops.add_norm_fwd(x, residual, *given, dtype)
    cuda_library.run(5, ops.add_norm_out, x, residual, *given, x, residual)
    assert same_bits(x, want[0]) and same_bits(residual, want[1])


def test_add_norm_long_rows():
    x, residual = torch.randn(2, 16388).to(torch.bfloat16), torch.randn(2, 16388)
    y, total, _ = twin(
        ops.add_norm_fwd,
        x,
        residual,
        1,
        None,
        None,
        1e-5,
        0.0,
        LAYER,
        torch.float32,
        regime="norm looped",
    )
    assert same_bits(total, x.float() + residual)
    assert_right(y, reference.layer_norm(total.double(), (16388,)))


def test_norm_over_several_dimensions_and_strides():
    x = torch.randn(2, 5, 4, 32).transpose(0, 1)
    y, _ = norm(x, torch.randn(4, 32), dims=2)
    assert y.shape == x.shape and y.is_contiguous()
    y, stats = norm(x)
    assert_right(y, F.layer_norm(x.double(), [32]))
    assert stats.shape == (3, 40)
    out = poisoned(y.contiguous())
    cuda_library.run(3, ops.norm_out, x, 1, None, None, 1e-5, 0.0, LAYER, out)
    assert same_bits(out, y)
    x = torch.randn(6, 700)
    assert same_bits(norm(x)[0][4:5], norm(x[4:5])[0])
    for shape in ((0, 5), (5, 0)):
        assert norm(torch.zeros(shape), seeds=[0])[0].shape == shape


# --- their backward


def check_norm_backward(
    x, weight=None, bias_dtype=None, dy=None, dsum=None, offset=0.0, rms=LAYER, eps=1e-5, **how
):
    """dx, dweight and dbias against float64, from the statistics of the twin's own forward."""
    dy = torch.randn(x.shape).to(x.dtype) if dy is None else dy
    stats = ops.norm_fwd(x, 1, weight, None, eps, offset, rms)[1]
    needs = [True, weight is not None, bias_dtype is not None]
    dx, dweight, dbias = twin(
        ops.norm_bwd, dy, dsum, x, stats, 1, weight, bias_dtype, offset, rms, needs, **how
    )
    inputs = [x.double().requires_grad_()]
    if weight is not None:
        inputs.append(weight.double().requires_grad_())
    if rms:
        y = reference.rms_norm(inputs[0], x.shape[-1:], *inputs[1:], eps=eps, weight_offset=offset)
    else:
        y = reference.layer_norm(inputs[0], x.shape[-1:], *inputs[1:], eps=eps, weight_offset=offset)
    exact = list(torch.autograd.grad(y, inputs, dy.double()))
    if dsum is not None:
        exact[0] += dsum.double()
    what = f"{x.dtype} {list(x.shape)} rms {rms}"
    assert_right(dx, exact[0], what=f"dx {what}")
    if weight is not None:
        assert_right(dweight, exact[1], what=f"dweight {what}")
    if bias_dtype is not None:
        assert_right(dbias, dy.double().sum(0), what=f"dbias {what}")
    return dx


def norm_backward_regime(width, dtype):
    most = 1 if dtype == torch.float32 else 2
    limits = (("lanes", 64 * most), ("warp", 256 * most), ("block", 4096 * most))
    return next((n for n, limit in limits if width <= limit), "looped")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_backward_widths(dtype):
    for i, width in enumerate((5, 130, 257, 777, 1032)):
        x = misaligned(7, width, dtype, offset=i % 2)
        weight = torch.randn(width).to((dtype, torch.float32)[i % 2])
        regime = f"norm_backward {norm_backward_regime(width, dtype)}"
        seeds = [i % 8, (i + 3) % 8]
        check_norm_backward(x, weight, torch.float32, regime=regime, seeds=seeds)
        dy = torch.randn(x.shape)
        check_norm_backward(
            x, weight, dy=dy, dsum=torch.randn(x.shape).to(dtype), offset=1.0, rms=RMS, seeds=seeds
        )
    x = torch.randn(3, 8200).to(dtype)
    check_norm_backward(x, torch.randn(8200), dtype, regime="norm_backward columns")
    check_norm_backward(x, rms=RMS, regime="norm_backward looped")


def test_norm_backward_of_many_rows():
    """More rows than groups, so that a block adds several."""
    for width, rows in ((24, 4200), (300, 1100)):
        x = torch.randn(rows, width).to(torch.bfloat16) + 3
        check_norm_backward(x, torch.randn(width), torch.float32, seeds=[0])
    x = torch.randn(1050, 520)
    check_norm_backward(x, torch.randn(520), torch.float32, seeds=[1])


def run_check(kind, seed, *shapes):
    result = build.run(build.program("rows_check.cpp", kind), seed, *shapes)
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    assert result.stdout.count(" ok\n") >= 10 * len(shapes), result.stdout


@pytest.mark.parametrize("seed", SEEDS)
def test_every_kernel_and_regime(seed):
    """Three rounds and more of what has rounds, in fp32 and bf16; rows and columns whose places need 64 bits."""
    run_check("plain", seed, "24x200", "45x40", "264x72", "1029x10", "4104x10", "far")


# What has no barrier in one width has it in another; TSan takes seconds for each block, so it gets few.
@pytest.mark.parametrize(
    "kind, shapes", [("asan", ("24x6", "264x4", "1029x2", "far")), ("tsan", ("24x6", "1029x2"))]
)
def test_rows_under_the_sanitizers(kind, shapes):
    run_check(kind, 5, *shapes)
