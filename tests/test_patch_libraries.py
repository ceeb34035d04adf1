"""`sdpa_patch` with the libraries whose models call `scaled_dot_product_attention` themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastattn


class TimmAttention(nn.Module):
    """timm's attention in short: `fused_attn` is its switch between the function and a formula."""

    def __init__(self, dim=32, heads=4, fused_attn=True):
        super().__init__()
        self.num_heads, self.head_dim, self.fused_attn = heads, dim // heads, fused_attn
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, attn_mask=None):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.fused_attn:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=0.0)
        else:
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            scores = scores if attn_mask is None else scores.masked_fill(~attn_mask, float("-inf"))
            y = scores.softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(B, N, C))


@pytest.mark.parametrize("masked", [False, True])
def test_timm_uses_the_function_while_its_switch_is_on(masked):
    model = nn.Sequential(TimmAttention(), TimmAttention())
    x = torch.randn(2, 9, 32, requires_grad=True)
    mask = torch.rand(2, 1, 9, 9) < 0.5 if masked else None
    mask = None if mask is None else mask | torch.eye(9, dtype=torch.bool)

    def run():
        out = x
        for layer in model:
            out = layer(out, mask)
        return out, *torch.autograd.grad(out.square().sum(), [x, *model.parameters()])

    expected = run()
    with fastattn.sdpa_patch() as patch:
        actual = run()
        assert patch.calls == 2 and not patch.passed_on
        model[0].fused_attn = False
        for a, e in zip((*actual, *run()), expected * 2):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5 * e.abs().max().item() + 1e-6)
        assert patch.calls == 3, "a layer whose switch is off computes its own formula"


def diffusers_attention(**keywords):
    processors = pytest.importorskip("diffusers.models.attention_processor")
    torch.manual_seed(0)
    return processors.Attention(query_dim=32, heads=4, dim_head=8, **keywords).eval()


def test_diffusers_attention_with_a_mask():
    attention = diffusers_attention(cross_attention_dim=16)
    x, other = torch.randn(2, 9, 32), torch.randn(2, 7, 16)
    mask = torch.zeros(2, 1, 7)
    mask[:, :, 4:] = -10000.0

    def run(mask):
        with torch.no_grad():
            return attention(x, encoder_hidden_states=other, attention_mask=mask)

    masked, whole = run(mask), run(None)
    with fastattn.sdpa_patch() as patch:
        torch.testing.assert_close(run(mask), masked, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(run(None), whole, rtol=1e-4, atol=1e-5)
    assert patch.calls == 2 and not patch.passed_on
    assert (masked - whole).abs().max() > 1e-3


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_diffusers_backends(backend):
    dispatch = pytest.importorskip("diffusers.models.attention_dispatch")
    if backend not in {b.value for b in dispatch.AttentionBackendName}:
        pytest.skip(f"this diffusers has no backend {backend}")
    q, k, v = (torch.randn(2, 9, 4, 8) for _ in range(3))  # [B, S, H, D]
    with dispatch.attention_backend(backend):
        expected = dispatch.dispatch_attention_fn(q, k, v)
        with fastattn.sdpa_patch() as patch:
            actual = dispatch.dispatch_attention_fn(q, k, v)
    assert patch.calls == 1
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_diffusers_model():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    ).eval()
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)

    def run():
        with torch.no_grad():
            return model(x, 3, text).sample

    expected = run()
    report = fastattn.swap(model)
    assert {e.after for e in report.swapped} == {"fastattn.nn.LayerNorm"}
    with fastattn.sdpa_patch() as patch:
        torch.testing.assert_close(run(), expected, rtol=1e-3, atol=1e-4)
    assert patch.calls > 4 and not patch.passed_on
    fastattn.restore(model)
    assert torch.equal(run(), expected)
