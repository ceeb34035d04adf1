"""Linear layers of inference on the CPU from 64 rows on: fastattn's product or oneDNN's, with the activation in it."""

import pytest
import torch
import torch.nn.functional as F

from fastattn import _info
from fastattn import nn as fnn
from fastattn._library import force_isa
from fastattn.nn import linear as module
from fastattn.tools.equivalence import error_rule

E, H = 24, 4
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=["ours", "onednn"])
def products(request, monkeypatch):
    """The activations of the products that neither F.linear nor the other kernel computed, whatever the machine."""
    if module._onednn is None:
        pytest.skip("this torch has no oneDNN")
    seen = []

    def spy(kernel):
        def call(x, weight, bias, activation, *rest):
            seen.append(activation)
            assert (kernel is ours) == (request.param == "ours" and x.dtype == torch.float32)
            return kernel(x, weight, bias, activation, *rest)

        return call

    ours = module._own
    monkeypatch.setattr(module, "_onednn", spy(module._onednn))
    monkeypatch.setattr(module, "_own", spy(ours))
    fp32 = request.param == "ours"
    monkeypatch.setattr(module, "_is_faster", lambda weight: fp32 and weight.dtype == torch.float32)
    return seen


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_like_torch(activation, bias, dtype, products):
    act = {"none": lambda t: t, "relu": F.relu, "gelu": F.gelu}[activation]
    for shape, width in (((64, 33), 40), ((2, 50, 24), 7), ((3, 5, 9, 16), 1)):
        x, weight = torch.randn(shape, dtype=dtype), torch.randn(width, shape[-1], dtype=dtype)
        b = torch.randn(width, dtype=dtype) if bias else None
        y = module.linear(x, weight, b, activation)
        exact = act(F.linear(x.double(), weight.double(), None if b is None else b.double()))
        assert error_rule(y, exact, act(F.linear(x, weight, b)))
    assert products == [activation] * 3


def test_calls_that_it_does_not_serve(products):
    weight, bias = torch.randn(8, 16), torch.randn(8)
    x = torch.randn(64, 16)
    module.linear(x[:63], weight, bias)
    module.linear(x.double(), weight.double(), bias.double())
    module.linear(x.clone().requires_grad_(), weight, bias)
    module.linear(x, weight.clone().requires_grad_(), bias)
    torch.vmap(lambda t: module.linear(t, weight, bias))(x.expand(2, 64, 16))
    with torch.autocast("cpu", torch.bfloat16):
        assert module.linear(x, weight, bias).dtype == torch.bfloat16
    assert not products
    with torch.no_grad():
        module.linear(x.clone().requires_grad_(), weight, bias)
    assert products == ["none"]
    with torch.backends.mkldnn.flags(enabled=False):
        module.linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16())
    assert products == ["none"]


def test_whose_product_it_is(restore_isa):
    weight = torch.randn(300, 256)
    for isa in _info.available_isas():
        force_isa(isa)
        assert module._is_faster(weight) == (isa == "amx")
        assert not module._is_faster(weight.bfloat16())
        assert not module._is_faster(weight[:255]) and not module._is_faster(weight[:, 1:])


@pytest.mark.skipif("amx" not in _info.available_isas(), reason="fastattn's product is for machines with AMX")
def test_who_asks_for_bf16_gets_it(restore_isa):
    """oneDNN's products round to bf16, on tiles, where torch's switch allows it."""
    force_isa("amx")
    weight = torch.randn(256, 256)
    before = torch.get_float32_matmul_precision()
    try:
        for precision, ours in (("highest", True), ("medium", False)):
            torch.set_float32_matmul_precision(precision)
            assert module._is_faster(weight) is ours
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_in_inference(norm_first, activation, dtype, products):
    """All products of both layers, packed or not, against torch's encoder in the same dtype and in float64."""
    layer = torch.nn.TransformerEncoderLayer(
        E, H, 40, 0.1, activation, batch_first=True, norm_first=norm_first, dtype=dtype
    )
    theirs = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    ours = fnn.TransformerEncoder.from_torch(theirs)
    exact = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(
            E, H, 40, 0.1, activation, batch_first=True, norm_first=norm_first, dtype=torch.float64
        ),
        2,
        enable_nested_tensor=False,
    ).eval()
    exact.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 50, E, dtype=dtype)
    padded = torch.zeros(3, 50, dtype=torch.bool)
    padded[1, 30:], padded[2, :20] = True, True
    with torch.no_grad():
        for mask in (None, padded):
            products.clear()
            y = ours(x, src_key_padding_mask=mask)
            assert products == ["none", "none", activation, "none"] * 2
            real = slice(None) if mask is None else ~padded
            expected = (
                model(t, src_key_padding_mask=mask)[real] for model, t in ((exact, x.double()), (theirs, x))
            )
            assert error_rule(y[real], *expected)
