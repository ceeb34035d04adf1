"""The attention bindings of the CUDA library, with sm_80's kernels on the host twin: the CPU op's results, argument by
argument, and the reference's gradients through the public function. The kernels' own tests are in
test_twin_attention.py and test_twin_attention_backward.py.
"""

import functools

import pytest
import torch
from row_checks import assert_right, same_bits
from test_attention_backward import check as check_gradients
from test_attention_backward import check_lse_alone
from twin import build, cuda_library

import fastattn
from fastattn import masks
from fastattn.masks.lower import lower
from fastattn.tools import cases, rivals, workloads
from fastattn.tools.families import AttentionShape

pytestmark = pytest.mark.skipif(build.missing is not None, reason=str(build.missing))

B, HQ, HKV, SQ, SK, D, DV = 2, 4, 2, 70, 133, 40, 56
ORDER = (
    "scale band_lo band_hi lo hi block_offsets block_list bit_tiles bias alibi_slopes softcap dropout_p dropout_seed "
    "q_pos k_pos block_table kv_lengths k_scale v_scale sinks out_fp32"
).split()


@pytest.fixture(scope="module", autouse=True)
def library():
    return cuda_library.load()


def operands():
    q, k, v = (torch.randn(B, s, h, d).half() for s, h, d in ((SQ, HQ, D), (SK, HKV, D), (SK, HKV, DV)))
    return [t.transpose(1, 2) for t in (q, k, v)]


def check(form, q, k, v, **given):
    arguments = (
        dict.fromkeys(ORDER) | {"scale": 0.2, "softcap": 0.0, "dropout_p": 0.0, "out_fp32": False} | given
    )
    arguments = [arguments[name] for name in ORDER]
    (out, lse), names = cuda_library.run(3, torch.ops.fastattn_cuda.attention_fwd, q, k, v, *arguments)
    assert names == [f"attention {form}"]
    wide = [
        t.float() if isinstance(t, torch.Tensor) and t.dtype == torch.half else t
        for t in (q, k, v, *arguments)
    ]
    exact, exact_lse = torch.ops.fastattn.attention_fwd(*wide)
    assert out.stride() == exact.stride() and out.dtype == (
        torch.float32 if given.get("out_fp32") else q.dtype
    )
    assert_right(out.half(), exact.double(), what=form, magnitude=v.abs().max().item())
    seen = exact_lse.isfinite()
    assert (lse.isfinite() == seen).all() and ((lse - exact_lse)[seen].abs() < 1e-3).all()
    return out


def test_terms():
    q, k, v = operands()
    check("none", q, k, v)
    check("none", q.contiguous(), k, v, out_fp32=True)
    check("none", q, k, v, softcap=3.0, bias=torch.randn(1, HQ, 1, SK))
    check("none", q, k, v, bias=torch.randn(B, 1, SQ, SK).half(), sinks=torch.randn(HQ))
    positions = torch.arange(SQ, dtype=torch.int32).expand(B, SQ) + 63
    check("none", q, k, v, alibi_slopes=torch.rand(1, HQ), q_pos=positions)
    check("none", q, k, v, dropout_p=0.3, dropout_seed=torch.tensor([7]))


def test_masks():
    q, k, v = operands()
    check("ranges", q, k, v, band_hi=SK - SQ)
    check("ranges", q, k, v, band_lo=-20, band_hi=2**40)
    lo = torch.randint(0, 60, (B, 1, 1), dtype=torch.int32)
    out = check("ranges", q, k, v, lo=lo, hi=torch.zeros_like(lo))
    assert (out == 0).all()
    m = lower(masks.Dense(torch.rand(B, 1, SQ, SK) < 0.4), B, HQ, HKV, SQ, SK, q.device)
    bits = {"block_offsets": m.block_offsets, "block_list": m.block_list, "bit_tiles": m.bit_tiles}
    a = check("bits", q, k, v, **bits)
    assert same_bits(a, check("bits", q, k, v, band_lo=None, **bits))


def test_what_a_direct_call_may_not_be():
    q, k, v = operands()
    none = [0.2, *[None] * 9, 0.0, 0.0, *[None] * 8, False]
    for wrong, said in (
        ((q.float(), k.float(), v.float()), "bfloat16 or float16"),
        ((q, k, v[:, :, :5]), "do not fit"),
        ((q, k.float(), v), "one dtype"),
        ((torch.zeros(1, 1, 2, 300).half(),) * 3, "at most 256"),
    ):
        with pytest.raises(RuntimeError, match=said if torch.__version__ >= "2.13" else ""):
            torch.ops.fastattn_cuda.attention_fwd(*wrong, *none)


def test_a_mask_that_hides_everything():
    q, k, v = operands()
    m = lower(masks.Dense(torch.zeros(SQ, SK, dtype=torch.bool)), B, HQ, HKV, SQ, SK, q.device)
    empty = torch.zeros(0, 2, dtype=torch.int32)
    assert m.block_list is None or m.block_list.numel() == 0
    offsets = torch.zeros(1, 1, (SQ + 63) // 64 + 1, dtype=torch.int32)
    tiles = torch.zeros(0, 64, dtype=torch.int64)
    out = check("bits", q, k, v, block_offsets=offsets, block_list=empty, bit_tiles=tiles)
    assert (out == 0).all()


@pytest.fixture
def attend(monkeypatch):
    cuda_library.serve_attention(monkeypatch)
    return functools.partial(fastattn.attention, backend="cuda")


# What makes gradients: the passes over rows, queries, keys, and of what is added to scores.
ROWS, QUERIES, KEYS, TERMS = (f"attention_bwd {kernel}" for kernel in ("rows", "queries", "keys", "terms"))
MAIN = (ROWS, QUERIES, KEYS)


def gradients(attend, form, passes=MAIN, mask=None, dlse=None, sums=(), **terms):
    """Checks the gradients, in the layout of what they are of, and which kernels ran."""
    q, k, v = operands()
    leaves = {"q": q, "k": k, "v": v} | terms
    given = attend
    if mask is not None:
        leaves["mask"] = mask.to_dense(SQ, SK, B, HQ)

        def given(q, k, v, **rest):
            return attend(q, k, v, **rest | {"mask": mask})

    dout = torch.randn(B, HQ, SQ, DV).half()
    ours, names = cuda_library.run(3, check_gradients, leaves, dout, dlse, sums, given)
    whole = ["attention_bwd sinks"] * ("sinks" in terms)
    whole += ["column_sums"] * (("sinks" in terms) + ("alibi_slopes" in terms))
    assert sorted(names) == sorted([f"{kernel} {form}" for kernel in ("attention", *passes)] + whole)
    for name, gradient in ours.items():
        assert gradient.stride() == leaves[name].stride(), name


draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(3))
FORMS = {
    "none": None,
    "ranges": masks.CausalLowerRight() & masks.KeyPadding([133, 60]),
    "bits": masks.Strided(24) & masks.SlidingWindow(50, 40),
}


@pytest.mark.parametrize("form", FORMS)
def test_gradients(attend, form):
    gradients(attend, form, mask=FORMS[form])


@pytest.mark.parametrize(
    "form, passes, terms",
    [
        ("ranges", (*MAIN, TERMS), {"bias": draw(B, 1, SQ, SK).half()}),
        ("none", (*MAIN, TERMS), {"bias": draw(1, HQ, 1, SK), "softcap": 3.0}),
        ("bits", (*MAIN, TERMS), {"alibi_slopes": draw(B, HQ).abs()}),
        ("none", MAIN, {"sinks": draw(HQ), "dropout_p": 0.3, "dropout_seed": torch.tensor(7)}),
        (
            "ranges",
            (*MAIN, TERMS, TERMS),
            {"bias": draw(1, 1, SQ, 1), "alibi_slopes": draw(HQ).abs(), "sinks": draw(HQ)},
        ),
    ],
    ids=["bias", "bias of keys", "slopes of a batch", "sinks and dropout", "all that is summed"],
)
def test_gradients_of_terms(attend, form, passes, terms):
    sums = ("alibi_slopes", "sinks", "bias")
    gradients(attend, form, passes, FORMS[form], dlse=torch.randn(B, HQ, SQ), sums=sums, **terms)


def test_gradients_of_the_lse_alone(attend):
    """Sinks so far above the scores that exp(sink) overflows among them."""
    cuda_library.run(1, check_lse_alone, attend, torch.half)


def test_only_what_is_asked_for_runs(attend):
    q, k, v = operands()
    bias = torch.randn(1, 1, 1, SK, requires_grad=True)
    names = cuda_library.run(1, lambda: attend(q, k, v, bias=bias).sum().backward())[1]
    assert names == ["attention none", f"{ROWS} none", f"{TERMS} none"]
    assert bias.grad.shape == bias.shape and not q.requires_grad
    v.requires_grad_()
    names = cuda_library.run(1, lambda: attend(q, k, v).sum().backward())[1]
    assert names == ["attention none", f"{ROWS} none", f"{KEYS} none"]
    assert v.grad.stride() == v.stride() and q.grad is None


@pytest.mark.parametrize("shape", [(0, 2, 3, 5), (1, 2, 0, 5), (1, 2, 3, 0)], ids=str)
def test_nothing_to_attend_to(attend, shape):
    n, h, sq, sk = shape
    q, k, v = (torch.randn(n, h, s, D).half().requires_grad_() for s in (sq, sk, sk))
    bias, sinks = torch.randn(1, h, 1, sk, requires_grad=True), torch.randn(h, requires_grad=True)
    attend(q, k, v, bias=bias, sinks=sinks).sum().backward()
    for t in (q, k, v, bias, sinks):
        assert t.grad.shape == t.shape and (t.grad == 0).all()


@pytest.mark.parametrize("training", [False, True])
def test_the_bench_times_it_beside_ours(attend, monkeypatch, training):
    monkeypatch.setattr(rivals, "_on_gpu", lambda case: None)
    shape = AttentionShape(1, 2, 70, 64, hkv=1)
    row = workloads.Workload("x", "attention", "fp16", shape, "causal", "flag", training=training)
    case = cases.build(row)
    call = rivals._ours_in_cuda(case)
    (ours, names), theirs = cuda_library.run(0, call), case.variants["torch"]()
    assert "attention ranges" in names and (f"{KEYS} ranges" in names) == training
    torch.testing.assert_close(ours, theirs, atol=4e-3, rtol=4e-3)


def test_the_fake_of_the_backward(attend):
    q, k, v = operands()
    out, lse = torch.zeros(B, HQ, SQ, DV).half(), torch.zeros(B, HQ, SQ)
    given = dict.fromkeys(ORDER) | {"scale": 0.2, "softcap": 0.0, "dropout_p": 0.0}
    given |= {"bias": torch.randn(1, HQ, 1, SK), "alibi_slopes": torch.rand(1, HQ), "sinks": torch.randn(HQ)}
    arguments = [given[name] for name in ORDER[:-1]]
    transposed = [None, None]
    for needs in ([True] * 6, [False, True, False, True, False, True]):
        call = (out, None, q, k, v, out, lse, *arguments[:7], *transposed, *arguments[7:], needs, False)
        torch.library.opcheck(
            torch.ops.fastattn_cuda.attention_bwd.default, call, test_utils="test_faketensor"
        )


def test_what_a_direct_call_of_the_backward_may_not_be():
    q, k, v = operands()
    out, lse = torch.zeros(B, HQ, SQ, DV).half(), torch.zeros(B, HQ, SQ)
    offsets = torch.zeros(1, 1, 3, dtype=torch.int32)
    lists = [offsets, torch.zeros(0, 2, dtype=torch.int32), None, None, torch.zeros(0, 64, dtype=torch.int64)]
    needs = [True] * 6

    def call(dout=out, dlse=None, out=out, lse=lse, lists=(None,) * 5, needs=needs):
        rest = (None, None, 0.0, 0.0, *[None] * 8, needs, False)
        return torch.ops.fastattn_cuda.attention_bwd(
            dout, dlse, q, k, v, out, lse, 0.2, None, None, None, None, *lists, *rest
        )

    for wrong, said in (
        ({"dout": out[:, :, :5]}, "the shape of the attention's result"),
        ({"lse": lse.double()}, "lse must be float32"),
        ({"lse": lse[:1]}, "lse must be"),
        ({"dlse": lse[:1]}, "dlse must have lse's shape"),
        ({"out": out.double()}, "out must be float32 or q's dtype"),
        ({"lists": lists}, "needs block_offsets_t"),
    ):
        with pytest.raises(RuntimeError, match=said if torch.__version__ >= "2.13" else ""):
            call(**wrong)
