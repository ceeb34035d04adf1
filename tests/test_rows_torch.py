"""The row ops under torch's own machinery: opcheck, compile, export, vmap, fake tensors, forward-mode AD."""

import pytest
import torch
import torch.nn.functional as F
from row_checks import same_bits

from fastattn import rows

ops = torch.ops.fastattn
opcheck = torch.library.opcheck


def layouts(dtype=torch.float32):
    x = torch.randn(4, 6, 10).to(dtype)
    return x, x.transpose(0, 1), x[:1, ::2].expand(4, 3, 10), torch.empty(0, 3, 10, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_softmax(dtype):
    for x in layouts(dtype):
        mask, bias = torch.rand(x.shape) < 0.5, torch.randn(x.shape[-2:])
        for arguments in ((None, None, 1.0, False), (mask, bias, 0.3, True)):
            opcheck(ops.softmax_fwd.default, (x, 2, *arguments, True))
            opcheck(ops.softmax_out.default, (x, 2, *arguments, torch.empty(x.shape, dtype=dtype)))
    opcheck(ops.softmax_fwd.default, (x.transpose(0, 2), 0, None, None, 1.0, False, False))


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck_norms(dtype, rms):
    weight, bias = torch.randn(10), None if rms else torch.randn(10)
    for x in layouts(dtype):
        new = torch.empty(x.shape, dtype=dtype)
        common = (1, weight, bias, 1e-5, 1.0, rms)
        opcheck(ops.norm_fwd.default, (x, *common))
        opcheck(ops.add_norm_fwd.default, (x, x.float(), *common, torch.float32))
        opcheck(ops.norm_out.default, (x, *common, new))
        opcheck(ops.add_norm_out.default, (x, x.float(), *common, new, torch.empty(x.shape)))


def every_function(x, weight, mask, bias):
    y = rows.softmax(x * 2, 1) + rows.softmax(
        x, dtype=torch.float32, mask=mask, bias=bias, causal=True, scale=0.333
    )
    y = rows.layer_norm(y, x.shape[-1:], weight, weight, 1e-6) + rows.rms_norm(y, [x.shape[-1]], weight)
    z, total = rows.add_layer_norm(y, x, x.shape[-1], weight)
    return rows.add_rms_norm(z, total, x.shape[-1], weight_offset=1.0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    compiled = torch.compile(every_function, fullgraph=True, dynamic=dynamic)
    for n in (8, 33):
        x, weight = torch.randn(3, n, n), torch.randn(n)
        mask, bias = torch.rand(n, n) < 0.7, torch.randn(n)
        for ours, theirs in zip(compiled(x, weight, mask, bias), every_function(x, weight, mask, bias)):
            torch.testing.assert_close(ours, theirs)


def test_compiles_with_out():
    def f(x, out, sum_out):
        rows.softmax(x, out=out)
        return rows.add_rms_norm(out, x, 9, out=out, sum_out=sum_out)

    x, out, sum_out = torch.randn(5, 9), torch.empty(5, 9), torch.empty(5, 9)
    torch.compile(f, fullgraph=True)(x, out, sum_out)
    expected = rows.add_rms_norm(rows.softmax(x), x, 9)
    assert same_bits(out, expected[0]) and same_bits(sum_out, expected[1])


def test_export():
    class Model(torch.nn.Module):
        def forward(self, x):
            return rows.rms_norm(rows.softmax(x), 9)

    x = torch.randn(4, 9)
    torch.testing.assert_close(torch.export.export(Model(), (x,)).module()(x), Model()(x))


def test_fake_tensors_have_true_strides():
    from torch._subclasses.fake_tensor import FakeTensorMode

    for x in layouts():
        with FakeTensorMode() as mode:
            fake = mode.from_tensor(x)
            fakes = (rows.softmax(fake, 1), rows.layer_norm(fake, 10), *rows.add_rms_norm(fake, fake, 10))
        for a, b in zip(fakes, (rows.softmax(x, 1), rows.layer_norm(x, 10), *rows.add_rms_norm(x, x, 10))):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap():
    x, weight = torch.randn(3, 4, 5, 9), torch.randn(3, 9)
    vmap = torch.func.vmap
    torch.testing.assert_close(vmap(rows.softmax)(x), torch.softmax(x, -1))
    torch.testing.assert_close(vmap(lambda t: rows.softmax(t, 0), 2, 2)(x), torch.softmax(x, 0))
    ours = vmap(lambda t, w: rows.rms_norm(t, 9, w))(x, weight)
    torch.testing.assert_close(ours, torch.stack([F.rms_norm(a, [9], w) for a, w in zip(x, weight)]))
    y, total = vmap(lambda t: rows.add_layer_norm(t, t, 9), 1)(x)
    torch.testing.assert_close(total, (x + x).movedim(1, 0))
    torch.testing.assert_close(y, F.layer_norm(x + x, [9]).movedim(1, 0))


def test_forward_mode_goes_to_the_reference():
    x, t, weight = torch.randn(4, 9), torch.randn(4, 9), torch.randn(9)
    for f, g in (
        (rows.softmax, lambda a: torch.softmax(a, -1)),
        (lambda a: rows.layer_norm(a, 9, weight), lambda a: F.layer_norm(a, [9], weight)),
        (lambda a: rows.add_rms_norm(a, x, 9)[0], lambda a: F.rms_norm(a + x, [9])),
    ):
        ours, theirs = (torch.func.jvp(h, (x,), (t,))[1] for h in (f, g))
        torch.testing.assert_close(ours, theirs)
