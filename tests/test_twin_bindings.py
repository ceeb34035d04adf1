"""The attention binding of the CUDA library, with sm_80's kernel on the host twin: the CPU op's results, argument by
argument. The kernels' own tests are in test_twin_attention.py.
"""

import pytest
import torch
from row_checks import assert_right, same_bits
from twin import build, cuda_library

from fastattn import masks
from fastattn.masks.lower import lower

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
