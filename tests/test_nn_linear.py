"""oneDNN's product with the activation in it: what inference on the CPU takes from 64 rows on."""

import pytest
import torch
import torch.nn.functional as F

from fastattn import nn as fnn
from fastattn.nn import linear as module
from fastattn.tools.equivalence import error_rule

E, H = 24, 4
DTYPES = [torch.float32, torch.bfloat16]

pytestmark = pytest.mark.skipif(module._onednn is None, reason="this torch has no oneDNN")


@pytest.fixture
def products(monkeypatch):
    """The activations of the products that oneDNN computed."""
    seen = []
    onednn = module._onednn

    def spy(x, weight, bias, activation, *rest):
        seen.append(activation)
        return onednn(x, weight, bias, activation, *rest)

    monkeypatch.setattr(module, "_onednn", spy)
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
    with torch.backends.mkldnn.flags(enabled=False):
        module.linear(x, weight, bias)
    assert not products
    with torch.no_grad():
        module.linear(x.clone().requires_grad_(), weight, bias)
    assert products == ["none"]


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
