"""`sdpa_patch` with the libraries whose models call `scaled_dot_product_attention` themselves."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastattn
from fastattn import functional


class Absent(types.ModuleType):
    """A module of torchvision where there is none: every name in it is an empty class."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, type(name, (nn.Module,), {}))
        return getattr(self, name)


class InterpolationMode:
    NEAREST, BILINEAR, BICUBIC, BOX, HAMMING, LANCZOS = "nearest bilinear bicubic box hamming lanczos".split()


@pytest.fixture(scope="module")
def timm():
    """The real timm.

    It imports torchvision, which has no build for CPU alone, for its data sets, its transforms and a frozen
    BatchNorm. Without one, empty classes stand in for those while timm is imported: the models here use none.
    """
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed: pip install --no-deps timm")
    if importlib.util.find_spec("torchvision") is not None:
        return pytest.importorskip("timm", exc_type=Exception)
    names = ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets")
    absent = {f"torchvision{name}": Absent(f"torchvision{name}") for name in names}
    absent["torchvision.transforms.functional"].InterpolationMode = InterpolationMode
    for name in names[1:]:
        parent, _, last = f"torchvision{name}".rpartition(".")
        setattr(absent[parent], last, absent[f"torchvision{name}"])
    sys.modules.update(absent)
    try:
        import timm
    finally:
        for name in absent:
            del sys.modules[name]
    return timm


# name: (timm's model and its sizes, images' size, calls of scaled_dot_product_attention in a forward)
TIMM = {
    "vit": ("vit_tiny_patch16_224", dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4), 2),
    "eva, with RoPE": (
        "eva02_tiny_patch14_224",
        dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4),
        2,
    ),
    "swin, whose shifted windows have masks": (
        "swin_tiny_patch4_window7_224",
        dict(img_size=32, patch_size=4, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4)),
        4,
    ),
}


@pytest.mark.parametrize("which", TIMM)
def test_timm_models(timm, which):
    name, sizes, calls = TIMM[which]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **sizes).eval()
    attention = [(path, m) for path, m in model.named_modules() if hasattr(m, "fused_attn")]
    assert len(attention) == calls
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.25)
    x, target = torch.randn(2, 3, 32, 32), torch.tensor([1, 4])

    def run():
        model.zero_grad()
        out = model(x)
        loss = F.cross_entropy(out, target)
        loss.backward()
        return [
            out.detach(),
            loss.detach(),
            *(p.grad.clone() for p in model.parameters() if p.grad is not None),
        ]

    def switch(on):
        for _, module in attention:
            module.fused_attn = on

    switch(True)
    theirs = run()
    report = fastattn.swap(model)
    left = {e.path: e.reason for e in report.left}
    assert left.keys() == {path for path, _ in attention}
    assert all("run it inside fastattn.sdpa_patch()" in reason for reason in left.values())
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert sum("LayerNorm" in e.before for e in report.swapped) == len(norms) > calls
    with fastattn.sdpa_patch() as patch:
        ours = run()
    assert patch.calls == calls and not patch.passed_on
    fastattn.restore(model)
    assert all(torch.equal(a, e) for a, e in zip(run(), theirs, strict=True))

    switch(False)
    formula = run()
    reasons = {e.path: e.reason for e in fastattn.swap(model).left}
    assert all("fastattn.sdpa_patch(model=...) switches it" in reasons[path] for path, _ in attention)
    with fastattn.sdpa_patch(model=model) as patch:
        switched = run()
    assert patch.calls == calls and not any(m.fused_attn for _, m in attention)
    for actual in (ours, switched):
        for a, e in zip(actual, formula, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4 * e.abs().max().item() + 1e-6)


def test_a_dropped_mask_shows_in_timm(timm, monkeypatch):
    name, sizes, calls = TIMM["swin, whose shifted windows have masks"]
    torch.manual_seed(0)
    model, x = timm.create_model(name, num_classes=5, **sizes).eval(), torch.randn(2, 3, 32, 32)
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.25)
    original = functional.scaled_dot_product_attention

    def unmasked(q, k, v, mask, *rest):
        return original(q, k, v, None, *rest)

    with torch.no_grad():
        expected = model(x)
        monkeypatch.setattr(functional, "scaled_dot_product_attention", unmasked)
        with fastattn.sdpa_patch(model=model) as patch:
            assert (model(x) - expected).abs().max() > 1e-2 * expected.abs().max()
    assert patch.calls == calls


class Attention(nn.Module):
    """Attention of the user's own, as timm has it: `fused_attn` chooses between the function and a formula."""

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
def test_a_switch_between_function_and_formula(masked):
    model = nn.Sequential(Attention(), Attention())
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


def test_a_diffusers_processor_with_a_formula_is_switched():
    processors = pytest.importorskip("diffusers.models.attention_processor")
    formula = processors.AttnProcessor()
    attention, x = diffusers_attention(processor=formula), torch.randn(2, 9, 32)
    with torch.no_grad():
        expected = attention(x)
        (entry,) = fastattn.swap(attention).left
        assert "fastattn.sdpa_patch(model=...) switches it" in entry.reason
        with fastattn.sdpa_patch(model=attention) as patch:
            torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-5)
    assert patch.calls == 1 and attention.processor is formula


def test_a_diffusers_backend_is_switched():
    dispatch = pytest.importorskip("diffusers.models.attention_dispatch")
    flux = pytest.importorskip("diffusers.models.transformers.transformer_flux")
    torch.manual_seed(0)
    attention = flux.FluxAttention(32, heads=4, dim_head=8, out_dim=32).eval()
    attention.processor._attention_backend = dispatch.AttentionBackendName._NATIVE_MATH
    x = torch.randn(2, 9, 32)
    with torch.no_grad():
        expected = attention(x)
        reasons = [e.reason for e in fastattn.swap(attention).left]
        assert any("fastattn.sdpa_patch(model=...) switches it" in reason for reason in reasons)
        with fastattn.sdpa_patch(model=attention) as patch:
            torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-5)
            assert attention.processor._attention_backend == "native"
    assert patch.calls == 1 and attention.processor._attention_backend == "_native_math"


def test_a_model_to_switch_is_a_module():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got list"):
        fastattn.sdpa_patch(model=[])


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
    assert {e.before for e in report.left} == {"Attention"}
    assert all("its AttnProcessor2_0 calls scaled_dot_product_attention" in e.reason for e in report.left)
    with fastattn.sdpa_patch() as patch:
        torch.testing.assert_close(run(), expected, rtol=1e-3, atol=1e-4)
    assert patch.calls > 4 and not patch.passed_on
    fastattn.restore(model)
    assert torch.equal(run(), expected)
