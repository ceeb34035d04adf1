"""The modules on Triton's kernels, forward and backward: what they give on a GPU without being asked."""

import copy

import pytest
import torch

import fastattn
from fastattn import functional, nn, rows, short

WIDTH = 32

MODULES = {
    "LayerNorm": lambda: nn.LayerNorm(WIDTH),
    "RMSNorm": lambda: nn.RMSNorm(WIDTH),
    "Softmax": lambda: nn.Softmax(-1),
    "MultiheadAttention": lambda: nn.MultiheadAttention(WIDTH, 4, batch_first=True),
    "GroupedQueryAttention": lambda: nn.GroupedQueryAttention(WIDTH, 4, 2),
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(
        WIDTH, 4, 64, dropout=0.0, batch_first=True
    ),
    "TransformerDecoderLayer": lambda: nn.TransformerDecoderLayer(
        WIDTH, 4, 64, dropout=0.0, batch_first=True
    ),
}


@pytest.fixture
def chosen(monkeypatch, triton_device):
    """The kernels that calls took. Without a GPU every call is sent to Triton, as on one it goes there by itself."""
    taken = []

    def choosing(choose):
        def choice(p, *kernels):
            if triton_device.type != "cuda":
                p.backend = "triton"
            found = choose(p, *kernels)
            taken.append(found.kernel.name)
            return found

        return choice

    for module in (functional, rows):
        monkeypatch.setattr(module, "choose", choosing(module.choose))
    # The short ways of the CPU choose nothing.
    monkeypatch.setattr(short, "is_plain", lambda *operands: False)
    monkeypatch.setattr(rows, "_is_plain", lambda *tensors: False)
    return taken


def run(module, x, name):
    x = x.detach().requires_grad_()
    inputs = {"MultiheadAttention": (x, x, x), "TransformerDecoderLayer": (x, x)}.get(name, (x,))
    out = module(*inputs)
    out = out[0] if isinstance(out, tuple) else out
    return out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()], allow_unused=True)


@pytest.mark.parametrize("name", MODULES)
def test_modules(name, chosen, triton_device):
    torch.manual_seed(0)
    module, x = MODULES[name](), torch.randn(2, 9, WIDTH)
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(functional, "choose", fastattn.dispatch.choose)
        plain.setattr(rows, "choose", fastattn.dispatch.choose)
        want = run(copy.deepcopy(module), x, name)
    del chosen[:]
    got = run(module.to(triton_device), x.to(triton_device), name)
    assert set(chosen) == {"triton"}
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a.cpu(), b, atol=2e-4, rtol=2e-4)
