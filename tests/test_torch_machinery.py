"""The op under torch's own machinery: opcheck, compile, export, vmap, fake tensors."""

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn import masks
from fastattn.masks.lower import lower
from fastattn.ops import _FWD


def arguments(q, k, v, **changes):
    names = _FWD[3:]
    given = (
        dict.fromkeys(names) | {"scale": 0.3, "softcap": 0.0, "dropout_p": 0.0, "out_fp32": False} | changes
    )
    return q, k, v, *(given[n] for n in names)


LAYOUTS = {
    "plain": lambda t: t,
    "heads last": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "one row": lambda t: t[:, :, :1],
    "expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "changes", [{}, {"band_hi": 0}, {"out_fp32": True}, {"sinks": torch.zeros(4)}], ids=str
)
def test_opcheck_forward(layout, changes):
    q, k, v = (LAYOUTS[layout](torch.randn(2, 4, 9, 16)) for _ in range(3))
    torch.library.opcheck(torch.ops.fastattn.attention_fwd.default, arguments(q, k, v, **changes))


def test_opcheck_plain():
    q = torch.randn(2, 4, 9, 16)
    torch.library.opcheck(torch.ops.fastattn.attention_plain.default, (q, q, q, 0.3, True))
    bounds = torch.zeros(2, 4, 9, dtype=torch.int32), torch.full((2, 4, 9), 7, dtype=torch.int32)
    m = lower(torch.rand(2, 1, 9, 9) < 0.5, 2, 4, 4, 9, 9, q.device)
    bits = m.block_offsets, m.block_list, m.bit_tiles
    for mask in ((None, 0, *bounds, None, None, None), (-3, None, None, None, *bits)):
        torch.library.opcheck(torch.ops.fastattn.attention_masked.default, (q, q, q, 0.3, *mask))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    def f(q, k, v, bias):
        a = fastattn.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.333)
        return fastattn.attention(a * 2, k, v, bias=bias, softcap=7.0) + 1

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic)
    for S in (8, 33, 70):
        q, k, v, bias = (torch.randn(2, 4, S, 16) for _ in range(3)), None, None, None
        q, k, v = q
        bias = torch.randn(4, S, S)
        torch.testing.assert_close(compiled(q, k, v, bias), f(q, k, v, bias))


def test_compiles_with_masks_of_ranges():
    def f(q, lengths):
        return fastattn.attention(q, q, q, mask=masks.Causal() & masks.SlidingWindow(5, 0))

    q = torch.randn(2, 4, 40, 16)
    torch.testing.assert_close(torch.compile(f, fullgraph=True)(q, None), f(q, None))


def test_export():
    class Model(torch.nn.Module):
        def forward(self, q, k):
            return fastattn.scaled_dot_product_attention(q, k, k, is_causal=True)

    q, k = torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    program = torch.export.export(Model(), (q, k))
    torch.testing.assert_close(program.module()(q, k), Model()(q, k))


def test_fake_tensors_have_true_strides():
    from torch._subclasses.fake_tensor import FakeTensorMode

    for layout in LAYOUTS.values():
        q = layout(torch.randn(2, 4, 9, 16))
        with FakeTensorMode() as mode:
            fake = fastattn.attention(*(mode.from_tensor(q) for _ in range(3)))
        real = fastattn.attention(q, q, q)
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_vmap():
    q = torch.randn(3, 2, 4, 9, 16)
    out = torch.func.vmap(fastattn.scaled_dot_product_attention)(q, q, q)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, q, q))
    k = torch.randn(2, 4, 9, 16)
    out = torch.func.vmap(lambda x: fastattn.attention(x, k, k, mask=masks.Causal()))(q)
    torch.testing.assert_close(
        out, torch.stack([F.scaled_dot_product_attention(x, k, k, is_causal=True) for x in q])
    )
    out = torch.func.vmap(fastattn.attention, in_dims=(2, 2, 2))(q, q, q)
    assert out.shape == (4, 3, 2, 9, 16)


def test_forward_mode_goes_to_the_reference():
    q = torch.randn(1, 2, 5, 8)
    t = torch.randn_like(q)
    _, ours = torch.func.jvp(lambda x: fastattn.attention(x, q, q), (q,), (t,))
    step = 1e-3
    numeric = (fastattn.attention(q + step * t, q, q) - fastattn.attention(q - step * t, q, q)) / (2 * step)
    assert ours.abs().max() > 0
    torch.testing.assert_close(ours, numeric, atol=2e-3, rtol=1e-2)


def test_pickled_mask_prepared_once():
    q = torch.randn(2, 4, 70, 16)
    plan = masks.Causal().prepare(q, q)
    assert torch.equal(
        fastattn.attention(q, q, q, mask=plan), fastattn.attention(q, q, q, mask=masks.Causal())
    )
    with pytest.raises(ValueError, match="prepared for"):
        fastattn.attention(q[:1], q[:1], q[:1], mask=plan)
