"""Meta tensors: every call gives what it gives on the CPU, without values; shapes, strides, dtypes, gradients."""

import copy

import pytest
import torch

import fastattn
from fastattn import masks, rows

B, H, S, D = 2, 4, 70, 16


def operands(heads=H, dtype=torch.float32, keys=S, width=D, rows_first=False, grad=False):
    """q, k and v on the CPU."""
    shapes = [(B, H, S, D), (B, heads, keys, D), (B, heads, keys, width)]
    tensors = [torch.randn(shape, dtype=dtype) for shape in shapes]
    if rows_first:
        tensors = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    return [t.requires_grad_(grad) for t in tensors]


def on_meta(value):
    if isinstance(value, torch.Tensor):
        return value.detach().to("meta").requires_grad_(value.requires_grad)
    return value


def same_form(meta, real):
    assert (meta is None) == (real is None)
    if isinstance(real, (tuple, list)):
        assert len(meta) == len(real)
        for a, b in zip(meta, real):
            same_form(a, b)
    elif real is not None:
        assert meta.is_meta
        assert (meta.shape, meta.stride(), meta.dtype) == (real.shape, real.stride(), real.dtype)
        assert meta.requires_grad == real.requires_grad


def agrees(function, *tensors, **arguments):
    """The same call on both devices, and its gradients where any is wanted."""
    given = {name: on_meta(value) for name, value in arguments.items()}
    everywhere = [t for t in (*tensors, *arguments.values()) if isinstance(t, torch.Tensor)]
    others = [on_meta(t) for t in tensors]
    real, meta = function(*tensors, **arguments), function(*others, **given)
    same_form(meta, real)
    first_real, first_meta = (r[0] if isinstance(r, tuple) else r for r in (real, meta))
    if first_real.requires_grad:
        wanted = [t for t in everywhere if t.requires_grad]
        theirs = [t for t in (*others, *given.values()) if isinstance(t, torch.Tensor) and t.requires_grad]
        gradients = torch.autograd.grad(first_real, wanted, torch.ones_like(first_real))
        same_form(torch.autograd.grad(first_meta, theirs, torch.ones_like(first_meta)), gradients)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("rows_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_attention(dtype, rows_first, grad):
    q, k, v = operands(2, dtype, keys=130, width=24, rows_first=rows_first, grad=grad)
    agrees(fastattn.attention, q, k, v, return_lse=True)
    agrees(fastattn.attention, q, k, v, return_weights=True, softcap=20.0, scale=0.3)
    slopes, sinks, bias = torch.rand(H), torch.randn(H), torch.randn(S, 130, dtype=dtype)
    for t in (sinks, bias):
        t.requires_grad_(grad)
    agrees(fastattn.attention, q, k, v, bias=bias, alibi_slopes=slopes, sinks=sinks, dropout_p=0.1)


@pytest.mark.parametrize("grad", [False, True])
def test_the_drop_in(grad):
    call = fastattn.scaled_dot_product_attention
    for tensors in (operands(grad=grad), operands(rows_first=True, grad=grad)):
        agrees(call, *tensors)
        agrees(call, *tensors, is_causal=True)
        agrees(call, *tensors, attn_mask=torch.ones(B, 1, 1, S, dtype=torch.bool))
        agrees(call, *tensors, attn_mask=torch.zeros(S, S), dropout_p=0.5)
    agrees(call, *[t[0] for t in operands(grad=grad)])


HOST_MASKS = {
    "causal": masks.Causal(),
    "window": masks.Causal() & masks.SlidingWindow(8, 0),
    "outside": ~masks.SlidingWindow(8, 8),
    "padding": masks.KeyPadding([S, 3]),
    "documents": masks.Documents([0, 20, S]) & masks.Causal(),
    "prefix": masks.PrefixLM(5),
    "union": masks.KeyPadding([S, 3]) | masks.Documents([0, 20, S]),
    "blocks": masks.BlockSparse(torch.eye(2, dtype=torch.bool), block=64),
    "predicate": masks.Predicate(lambda b, h, i, j: i != j),
    "longformer": masks.Longformer(8, [0, 4]),
}


@pytest.mark.parametrize("name", HOST_MASKS)
def test_masks_of_the_host(name):
    agrees(fastattn.attention, *operands(grad=True), mask=HOST_MASKS[name])


@pytest.mark.parametrize(
    "make",
    [
        lambda empty: masks.KeyPadding(empty(B, dtype=torch.int32)),
        lambda empty: masks.KeyPadding(empty(B, S, dtype=torch.bool)),
        lambda empty: masks.Dense(empty(S, S, dtype=torch.bool)) & masks.Causal(),
        lambda empty: masks.Dense(empty(B, 1, 1, S, dtype=torch.bool)),
        lambda empty: masks.Documents(empty(4, dtype=torch.int32)),
        lambda empty: masks.Documents(ids=empty(B, S, dtype=torch.int32)) | masks.Causal(),
        lambda empty: masks.PrefixLM(empty(B, dtype=torch.int32)) | masks.KeyPadding([3, 4]),
    ],
    ids=["lengths", "padding", "dense", "keys", "documents", "ids", "union"],
)
def test_masks_without_values(make):
    mask = make(lambda *shape, **options: torch.empty(*shape, device="meta", **options))
    q, k, v = [on_meta(t) for t in operands()]
    prepared = mask.prepare(q, k)
    for given in (mask, prepared):
        same_form(fastattn.attention(q, k, v, mask=given), fastattn.attention(*operands()))


def test_what_does_not_fit_is_refused_as_on_the_cpu():
    q, k, v = [on_meta(t) for t in operands()]
    with pytest.raises(ValueError, match="lengths has batch 3, the call has batch 2"):
        fastattn.attention(q, k, v, mask=masks.KeyPadding([1, 2, 3]))
    with pytest.raises(ValueError, match="mask of shape .* does not broadcast"):
        fastattn.attention(q, k, v, mask=torch.ones(3, S, dtype=torch.bool, device="meta"))
    with pytest.raises(ValueError, match="q, k, v must be on one device, got q on meta, k on cpu, v on meta"):
        fastattn.attention(q, operands()[1], v)
    with pytest.raises(ValueError, match="mask must be on meta like q, got cpu"):
        fastattn.attention(q, k, v, mask=torch.ones(S, S, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="backend='triton' cannot run this call: q is on meta"):
        fastattn.attention(q, k, v, backend="triton")
    with pytest.raises(ValueError, match="weight must be on meta like x, got cpu"):
        fastattn.layer_norm(q, D, torch.ones(D))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows_first", [False, True])
def test_rows(dtype, grad, rows_first):
    x, residual = torch.randn(2, 3, 5, 32, dtype=dtype), torch.randn(2, 3, 5, 32)
    x = x.transpose(0, 1) if rows_first else x
    residual = residual.view(x.shape)
    weight, bias = torch.ones(32, dtype=dtype), torch.zeros(32, dtype=dtype)
    for t in (x, residual, weight, bias):
        t.requires_grad_(grad)
    agrees(fastattn.softmax, x)
    agrees(fastattn.softmax, x, dim=1, scale=0.5)
    agrees(fastattn.softmax, x, dtype=torch.float32, mask=torch.ones(5, 32, dtype=torch.bool), causal=True)
    agrees(fastattn.softmax, x, bias=bias)
    agrees(fastattn.layer_norm, x, normalized_shape=32, weight=weight, bias=bias)
    agrees(fastattn.rms_norm, x, normalized_shape=(32,), weight=weight, weight_offset=1.0)
    agrees(fastattn.add_layer_norm, x, residual, normalized_shape=32, weight=weight, bias=bias)
    agrees(fastattn.add_rms_norm, x, residual, normalized_shape=32, weight=weight, sum_dtype=torch.float32)


def test_results_in_given_tensors():
    q, k, v = [on_meta(t) for t in operands()]
    out = torch.empty_like(q)
    assert fastattn.attention(q, k, v, out=out) is out
    assert fastattn.softmax(q, out=out) is out and fastattn.rms_norm(q, D, out=out) is out
    with pytest.raises(ValueError, match="out must be a tensor"):
        fastattn.attention(q, k, v, out=out[..., :3])


def test_autocast_leaves_them_alone():
    q, k, v = [on_meta(t) for t in operands()]
    with torch.autocast("cpu", torch.bfloat16):
        assert fastattn.attention(q, k, v).dtype == fastattn.rms_norm(q, D).dtype == torch.float32


def test_explain():
    q, k, v = [on_meta(t) for t in operands()]
    said = str(fastattn.explain(q, k, v, mask=masks.Causal()))
    assert "float32 on meta" in said and "nothing is computed, and a mask is not read" in said
    assert "meta tensors have no values" in str(rows.explain(rows.softmax, q))


@pytest.mark.parametrize("grad", [False, True])
def test_modules(grad):
    nn = fastattn.nn
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    x = torch.randn(B, 10, 32)
    for padding in (torch.zeros(B, 10, dtype=torch.bool), torch.zeros(B, 10)):
        for module, arguments, name in (
            (nn.MultiheadAttention(32, 4, batch_first=True), (x, x, x), "key_padding_mask"),
            (layer, (x,), "src_key_padding_mask"),
            (nn.TransformerEncoder(layer, 2), (x,), "src_key_padding_mask"),
        ):
            module = copy.deepcopy(module).train(grad)
            with torch.set_grad_enabled(grad):
                real = module(*arguments, **{name: padding})
                module.to("meta")
                meta = module(*[on_meta(t) for t in arguments], **{name: on_meta(padding)})
            same_form(meta, real)
