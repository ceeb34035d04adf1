"""fastattn.scaled_dot_product_attention against torch's, and what a wrong call is told."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn import _info, _library, masks

sdpa = fastattn.scaled_dot_product_attention


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 2, 3), (2, 1, 2, 2)])
def test_any_rank(lead, causal):
    q, k, v = torch.randn(*lead, 7, 16), torch.randn(*lead, 9, 16), torch.randn(*lead, 9, 5)
    torch.testing.assert_close(
        sdpa(q, k, v, is_causal=causal), F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    )


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 3, 7, 16), (1, 3, 9, 16), (2, 3, 9, 16)),
        ((1, 3, 7, 16), (2, 3, 9, 16), (2, 3, 9, 16)),
        ((2, 3, 7, 16), (2, 1, 9, 16), (2, 1, 9, 16)),
        ((3, 7, 16), (2, 3, 9, 16), (2, 3, 9, 16)),
        ((2, 1, 7, 16), (2, 3, 9, 16), (2, 3, 9, 16)),
    ],
)
def test_leading_dimensions_broadcast(shapes):
    q, k, v = (torch.randn(s) for s in shapes)
    torch.testing.assert_close(sdpa(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_causal_is_upper_left():
    for Sq, Sk in ((5, 9), (9, 5), (64, 65), (130, 70)):
        q, k = torch.randn(1, 2, Sq, 16), torch.randn(1, 2, Sk, 16)
        torch.testing.assert_close(
            sdpa(q, k, k, is_causal=True), F.scaled_dot_product_attention(q, k, k, is_causal=True)
        )


@pytest.mark.parametrize(
    "shape", [(9,), (7, 9), (1, 9), (7, 1), (3, 7, 9), (2, 1, 7, 9), (2, 3, 1, 9), (1, 1, 1, 1)]
)
@pytest.mark.parametrize("kind", ["bool", "float", "infinite"])
def test_mask_shapes(shape, kind):
    q, k, v = torch.randn(2, 3, 7, 16), torch.randn(2, 3, 9, 16), torch.randn(2, 3, 9, 16)
    mask = torch.rand(shape) > 0.4 if kind == "bool" else torch.randn(shape)
    if kind == "infinite":
        mask = torch.where(mask > 0.3, -math.inf, 0.0)
    if len(shape) == 1:
        with pytest.raises(ValueError, match="attn_mask"):
            sdpa(q, k, v, attn_mask=mask)
        return
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).nan_to_num(0.0)
    torch.testing.assert_close(sdpa(q, k, v, attn_mask=mask), expected)


def test_three_dimensional_mask_is_heads():
    q = torch.randn(2, 2, 5, 8)
    mask = torch.rand(2, 5, 5) > 0.3
    torch.testing.assert_close(
        sdpa(q, q, q, attn_mask=mask), F.scaled_dot_product_attention(q, q, q, attn_mask=mask).nan_to_num(0)
    )
    q = torch.randn(4, 3, 5, 8)
    with pytest.raises(ValueError, match=r"attn_mask.*\[H, Sq, Sk\]"):
        sdpa(q, q, q, attn_mask=torch.rand(4, 5, 5) > 0.3)


@pytest.mark.parametrize("Sk", [33, 65, 127, 130])
def test_sliced_masks(Sk):
    q, k = torch.randn(1, 2, 40, 32), torch.randn(1, 2, Sk, 32)
    big = torch.rand(64, Sk + 13) > 0.5
    mask = big[3:43, 5 : 5 + Sk]
    torch.testing.assert_close(
        sdpa(q, k, k, attn_mask=mask), F.scaled_dot_product_attention(q, k, k, attn_mask=mask).nan_to_num(0)
    )


def test_rows_that_see_nothing_are_zero():
    q = torch.randn(1, 2, 6, 8)
    for mask in (torch.zeros(6, 6, dtype=torch.bool), torch.full((6, 6), -math.inf)):
        assert torch.equal(sdpa(q, q, q, attn_mask=mask), torch.zeros_like(q))


def test_lowest_finite_is_a_bias():
    q = torch.randn(1, 2, 6, 8)
    mask = torch.full((6, 6), torch.finfo(torch.float32).min)
    out = sdpa(q, q, q, attn_mask=mask)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, q, q, attn_mask=mask))
    assert out.abs().sum() > 0


def test_padding_and_causal_together():
    q = torch.randn(2, 2, 12, 8)
    padding = torch.arange(12) < torch.tensor([[12], [5]])
    both = masks.Causal() & masks.KeyPadding(padding)
    dense = torch.ones(12, 12, dtype=torch.bool).tril() & padding[:, None, None, :]
    torch.testing.assert_close(
        sdpa(q, q, q, attn_mask=both), F.scaled_dot_product_attention(q, q, q, attn_mask=dense)
    )


def test_gqa():
    q, k, v = torch.randn(2, 9, 20, 16), torch.randn(2, 3, 20, 16), torch.randn(2, 3, 20, 8)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(sdpa(q, k, v, is_causal=True, enable_gqa=True), expected)


def test_autocast():
    q = torch.randn(1, 2, 12, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert sdpa(q, q, q).dtype == F.scaled_dot_product_attention(q, q, q).dtype == torch.bfloat16
        mixed = sdpa(q, q, q.bfloat16())
    torch.testing.assert_close(mixed, sdpa(*[q.bfloat16()] * 3))


Q, K = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
PADDING = torch.ones(2, 1, 1, 5).bool()
WRONG = [
    (lambda: sdpa(Q, K, K), ValueError, r"heads of query \(4\).*key \(2\).*enable_gqa"),
    (
        lambda: sdpa(Q, torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8), enable_gqa=True),
        ValueError,
        "multiple",
    ),
    (
        lambda: sdpa(Q, Q, Q, attn_mask=torch.ones(5, 5).bool(), is_causal=True),
        ValueError,
        "attn_mask.*is_causal",
    ),
    (lambda: sdpa(Q, Q, Q, attn_mask=torch.ones(5, 5).int()), TypeError, "attn_mask.*bool.*int32"),
    (lambda: sdpa(Q, Q, Q, attn_mask=torch.ones(5, 5).double()), TypeError, "attn_mask.*float64"),
    (lambda: sdpa(Q, Q, Q, attn_mask=torch.ones(4, 5).bool()), ValueError, r"attn_mask.*\[4, 5\]"),
    (lambda: sdpa(Q, Q, Q, attn_mask="causal"), TypeError, "attn_mask.*str"),
    (lambda: sdpa(Q, Q, Q, dropout_p=1.0), ValueError, r"dropout_p.*\[0, 1\).*1.0"),
    (lambda: sdpa(Q, Q, Q, dropout_p=-0.1), ValueError, "dropout_p"),
    (lambda: sdpa(Q, Q, Q.bfloat16()), TypeError, "one dtype.*value bfloat16"),
    (lambda: sdpa(Q.int(), Q.int(), Q.int()), TypeError, "query.*int32"),
    (lambda: sdpa(Q, Q[..., :7], Q), ValueError, "last dimension.*8 and 7"),
    (lambda: sdpa(Q, Q, Q[:, :, :4]), ValueError, "rows.*5 and 4"),
    (lambda: sdpa(Q, [1.0], Q), TypeError, "key must be a tensor, got list"),
    (lambda: sdpa(Q[0, 0, 0], Q, Q), ValueError, "query.*2 dimensions"),
    (lambda: sdpa(Q, torch.randn(3, 4, 5, 8), torch.randn(3, 4, 5, 8)), ValueError, "broadcast"),
    (lambda: sdpa(Q, Q, Q, backend="flash"), ValueError, "backend.*cpu.*'flash'"),
    (lambda: sdpa(Q, Q, Q, backend="triton"), RuntimeError, "triton.*cannot run.*q is on cpu"),
    (lambda: sdpa(*[Q.double()] * 3, backend="cpu"), RuntimeError, "float64"),
    (lambda: fastattn.attention(Q, Q, Q, softcap=0.0), ValueError, "softcap.*positive"),
    (lambda: fastattn.attention(Q, Q, Q, sinks=torch.zeros(3)), ValueError, r"sinks.*\[4\]"),
    (lambda: fastattn.attention(Q, Q, Q, alibi_slopes=torch.zeros(3)), ValueError, r"alibi_slopes.*\[4\]"),
    (lambda: fastattn.attention(Q, Q, Q, bias=torch.zeros(6, 6)), ValueError, "bias"),
    (lambda: fastattn.attention(Q, Q, Q, bias=torch.zeros(5, 5).bool()), TypeError, "bias.*bool"),
    (lambda: fastattn.attention(Q, Q, Q, out=torch.empty(1)), ValueError, r"out must be.*\[2, 4, 5, 8\]"),
    (lambda: fastattn.attention(Q, Q, Q, out=Q), ValueError, "share memory with q"),
    (lambda: fastattn.attention(Q, Q, Q, dropout_p=0.1, dropout_seed=1.5), TypeError, "dropout_seed.*float"),
    (
        lambda: fastattn.attention(Q, Q, Q, dropout_p=0.1, dropout_seed=torch.ones(2)),
        ValueError,
        "dropout_seed",
    ),
    (lambda: fastattn.attention(Q, Q, Q, dropout_seed="x"), TypeError, "dropout_seed.*str"),
    (
        lambda: fastattn.attention(Q, Q, Q, dropout_p=0.1, dropout_seed=2**63),
        ValueError,
        "dropout_seed.*int64",
    ),
    (lambda: fastattn.attention(Q, Q, Q, generator=7), TypeError, "generator.*int 7"),
    (
        lambda: fastattn.attention(Q, Q, Q, dropout_seed=1, generator=torch.Generator()),
        ValueError,
        "dropout_seed and generator",
    ),
    (lambda: sdpa(Q, Q, Q, scale="x"), TypeError, "scale must be a number.*'x'"),
    (lambda: sdpa(Q, Q, Q, scale=[1.0]), TypeError, "scale must be a number.*list"),
    (lambda: sdpa(Q, Q, Q, PADDING, scale=1j), TypeError, "scale must be a number.*complex"),
    (lambda: fastattn.attention(Q, Q, Q, scale=torch.ones(2)), TypeError, r"scale.*\[2\]"),
    (lambda: sdpa(Q, Q, Q, is_causal="x"), TypeError, "is_causal must be True or False.*'x'"),
    (lambda: sdpa(Q, Q, Q, is_causal=torch.tensor([True, False])), TypeError, "is_causal"),
    (lambda: fastattn.attention(Q, Q, Q, softcap="x"), TypeError, "softcap must be a number"),
    (lambda: fastattn.attention(Q, Q, Q, softcap=float("inf")), ValueError, "softcap.*finite"),
    (lambda: fastattn.attention(Q, Q, Q, sinks=torch.zeros(4).int()), TypeError, "sinks.*int32"),
    (
        lambda: fastattn.attention(Q, Q, Q, alibi_slopes=torch.zeros(4, dtype=torch.complex64)),
        TypeError,
        "alibi_slopes.*complex64",
    ),
    (
        lambda: fastattn.explain(Q, Q, Q, mask=masks.KeyPadding([3, 2]), is_causal=True),
        ValueError,
        "mask.*is_causal",
    ),
    (lambda: fastattn.explain(Q, Q, Q, gqa=False), TypeError, "unexpected keyword argument 'gqa'"),
    (lambda: fastattn.attention(Q, Q, Q, mask=masks.KeyPadding([9, 1])), ValueError, "KeyPadding.*lengths"),
    (lambda: fastattn.attention(Q, Q, Q, mask=masks.KeyPadding([1, 1, 1])), ValueError, "KeyPadding"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_a_wrong_call_is_told_why(case):
    call, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("given", [False, True])
def test_nothing_is_drawn_for_a_call_that_does_not_run(given):
    generator = torch.Generator().manual_seed(3) if given else torch.default_generator
    arguments = dict(dropout_p=0.5, generator=generator if given else None)
    before = generator.get_state()
    fastattn.explain(Q, Q, Q, **arguments)
    for more in (dict(backend="triton"), dict(out=torch.empty(1)), dict(mask=masks.KeyPadding([9, 1]))):
        with pytest.raises((RuntimeError, ValueError)):
            fastattn.attention(Q, Q, Q, **arguments, **more)
    assert torch.equal(generator.get_state(), before)
    fastattn.attention(Q, Q, Q, **arguments)
    assert not torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("shapes", list(itertools.product(["5", "245", "45"], repeat=3)))
def test_operands_of_different_ranks_broadcast(shapes):
    q, k, v = (torch.randn(*(int(c) for c in shape), 8) for shape in shapes)
    try:
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    except RuntimeError:
        with pytest.raises(ValueError, match="heads|broadcast"):
            sdpa(q, k, v)
    else:
        torch.testing.assert_close(sdpa(q, k, v), expected)


def test_a_library_that_does_not_load_names_both_versions(monkeypatch, tmp_path):
    broken = tmp_path / "_ops.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(_library, "_OPS", broken)
    with pytest.raises(ImportError) as refused:
        _library._load()
    assert torch.__version__ in str(refused.value)
    assert _info.build_info()["torch_headers"] in str(refused.value)
    monkeypatch.setattr(_library, "_OPS", tmp_path / "missing.so")
    with pytest.raises(ImportError, match="not built.*pip install"):
        _library._load()


def test_nested_tensors_are_refused():
    nested = torch.nested.nested_tensor([torch.randn(2, 3, 8), torch.randn(2, 4, 8)])
    with pytest.raises(TypeError, match="strided.*Documents"):
        sdpa(nested, nested, nested)


def test_explain_names_everything():
    q = torch.randn(1, 2, 70, 16).transpose(2, 3).contiguous().transpose(2, 3)
    said = str(fastattn.explain(q, q, q, mask=masks.Causal() & masks.KeyPadding([50]), return_weights=True))
    for word in (
        "kernel   cpu",
        "refused  triton: q is on cpu",
        "band j <= i+0",
        "q is copied once",
        "weights",
    ):
        assert word in said
    assert fastattn.explain(q, q, q, backend="reference").kernel == "reference"


def test_explain_takes_the_arguments_of_attention():
    q = torch.randn(1, 2, 7, 16)
    arguments = dict(softcap=3.0, sinks=torch.zeros(2), dropout_p=0.1, scale=0.2, return_lse=True)
    assert "softcap 3.0, sinks, dropout 0.1" in str(fastattn.explain(q, q, q, **arguments))
