"""`mha_to_gqa`: pooled heads, the config, and what is refused without a change."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastattn
from fastattn.convert import mha_to_gqa

transformers = pytest.importorskip("transformers")


def llama(kv_heads=4, **changes):
    sizes = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=99
    )
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=kv_heads, initializer_range=0.3, **changes)
    return transformers.LlamaForCausalLM(config).eval()


def logits(model):
    ids = torch.randint(0, 99, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids).logits


def repeat_heads(model, times):
    """Makes every `times` neighbouring key and value heads equal."""
    for layer in model.model.layers:
        for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            for p in linear.parameters():
                heads = p.data.unflatten(0, (4, -1))
                heads.copy_(heads[::times].repeat_interleave(times, 0))


@pytest.mark.parametrize("wanted", [4, 2, 1])
@pytest.mark.parametrize("bias", [False, True])
def test_equal_heads_are_merged_without_a_difference(wanted, bias):
    model = llama(attention_bias=bias)
    repeat_heads(model, 4 // wanted)
    expected = logits(model)
    assert mha_to_gqa(model, wanted) is model
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (8 * wanted, 32)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


FAMILIES = {
    "Mistral": {},
    "Qwen2": {},
    "Qwen3": dict(head_dim=16),  # norms of queries and keys a head
    "Gemma2": dict(head_dim=16, query_pre_attn_scalar=16),
    "GptOss": dict(head_dim=16, num_local_experts=2, num_experts_per_tok=1),  # sinks
}


@pytest.mark.parametrize("family", FAMILIES)
def test_others_of_llama_s_kind(family, tmp_path):
    config = getattr(transformers, f"{family}Config")(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=99,
        num_key_value_heads=4, initializer_range=0.3, **FAMILIES[family],
    )  # fmt: skip
    config._attn_implementation = "eager"  # SDPA, the default of some versions, has no softcap and no sinks
    cls = getattr(transformers, f"{family}ForCausalLM")
    model = cls(config).eval()
    repeat_heads(model, 2)
    expected = logits(model)
    mha_to_gqa(model, 2)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    fastattn.swap(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    fastattn.restore(model)
    model.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert again.config.num_key_value_heads == 2
    torch.testing.assert_close(logits(again), logits(model))


def test_heads_are_means():
    model = llama()
    before = copy.deepcopy(model)
    mha_to_gqa(model, 2)
    mha_to_gqa(model, 1)
    for old, new in zip(before.model.layers, model.model.layers):
        for name in ("k_proj", "v_proj"):
            weight = getattr(old.self_attn, name).weight
            torch.testing.assert_close(
                getattr(new.self_attn, name).weight, weight.unflatten(0, (4, 8)).mean(0), rtol=1e-5, atol=1e-6
            )
        assert torch.equal(old.self_attn.q_proj.weight, new.self_attn.q_proj.weight)


def test_half_precision_is_pooled_in_float32():
    model = llama().bfloat16()
    weight = model.model.layers[0].self_attn.k_proj.weight
    expected = weight.float().unflatten(0, (1, 4, 8)).mean(1).flatten(0, 1).bfloat16()
    mha_to_gqa(model, 1)
    assert torch.equal(model.model.layers[0].self_attn.k_proj.weight, expected)


def test_saved_and_loaded_again(tmp_path):
    model = mha_to_gqa(llama(), 2)
    model.save_pretrained(tmp_path)
    other = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert other.config.num_key_value_heads == 2
    torch.testing.assert_close(logits(other), logits(model))


def test_generates_with_a_cache_and_trains():
    model = mha_to_gqa(llama(), 2)
    ids = torch.randint(0, 99, (1, 5))
    assert model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 8)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_single_module_leaves_the_config():
    model = llama()
    mha_to_gqa(model.model.layers[0].self_attn, 2)
    assert model.config.num_key_value_heads == 4
    assert logits(model).isfinite().all()


def test_frozen_stays_frozen():
    model = llama()
    model.model.layers[0].self_attn.k_proj.weight.requires_grad_(False)
    mha_to_gqa(model, 2)
    assert not model.model.layers[0].self_attn.k_proj.weight.requires_grad
    assert model.model.layers[1].self_attn.k_proj.weight.requires_grad


class NotQuiteLinear(nn.Linear):
    pass


def break_last_layer(model):
    model.model.layers[1].self_attn.v_proj.__class__ = NotQuiteLinear


@pytest.mark.parametrize(
    "make, wanted, error, message",
    [
        (llama, 3, ValueError, "must divide the 4 key heads and 4 query heads"),
        (llama, 0, ValueError, "at least 1, got 0"),
        (llama, True, ValueError, "at least 1, got True"),
        (lambda: nn.Linear(2, 2), 1, TypeError, "Linear has no attention with q_proj"),
        (list, 1, TypeError, "must be a torch.nn.Module, got list"),
        (lambda: llama().to("meta"), 1, ValueError, "on the meta device"),
    ],
)
def test_refusals(make, wanted, error, message):
    with pytest.raises(error, match=message):
        mha_to_gqa(make(), wanted)


def test_a_refusal_changes_nothing():
    model = llama()
    break_last_layer(model)
    with pytest.raises(
        TypeError, match="layers.1.self_attn.v_proj must be a torch.nn.Linear.*NotQuiteLinear"
    ):
        mha_to_gqa(model, 2)
    assert model.config.num_key_value_heads == 4
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (32, 32)


def test_norms_over_all_heads_are_refused():
    model = llama()
    model.model.layers[0].self_attn.k_norm = nn.RMSNorm(32)
    with pytest.raises(TypeError, match="k_norm spans all key heads"):
        mha_to_gqa(model, 2)


def test_grouped_attention_of_ours():
    torch.manual_seed(0)
    module = fastattn.nn.GroupedQueryAttention(32, 8, 4, bias=True, qk_norm="rms_norm")
    x = torch.randn(2, 5, 32)
    for name in "kv":  # heads equal in pairs: their means are themselves
        p = getattr(module, f"{name}_proj")
        with torch.no_grad():
            for t in (p.weight, p.bias):
                t.copy_(t.unflatten(0, (2, 2, 4))[:, :1].expand(2, 2, 4, *t.shape[1:]).flatten(0, 2))
    expected = module(x, is_causal=True)
    model = nn.Sequential(module)
    assert mha_to_gqa(model, 2) is model and module.num_kv_heads == 2
    assert module.k_proj.weight.shape == (8, 32) and module.v_proj.out_features == 8
    torch.testing.assert_close(module(x, is_causal=True), expected)


@pytest.mark.parametrize("kind", [nn.MultiheadAttention, fastattn.nn.MultiheadAttention])
@pytest.mark.parametrize("widths", [{}, {"kdim": 16, "vdim": 24}])
def test_multihead_attention_becomes_grouped(kind, widths):
    torch.manual_seed(0)
    module = kind(32, 4, batch_first=True, **widths).eval()
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    q, k, v = (torch.randn(2, n, widths.get(w, 32)) for n, w in ((5, ""), (6, "kdim"), (6, "vdim")))
    same = mha_to_gqa(module, 4)
    assert isinstance(same, fastattn.nn.GroupedQueryAttention)
    torch.testing.assert_close(same(q, k, v), module(q, k, v, need_weights=False)[0], rtol=1e-4, atol=1e-5)
    fewer = mha_to_gqa(module, 2)
    heads = same.k_proj.weight.view(2, 2, 8, -1)
    torch.testing.assert_close(fewer.k_proj.weight.view(2, 8, -1), heads.mean(1))
    assert fewer(q, k, v).shape == q.shape


@pytest.mark.parametrize(
    "keywords, wanted, error, message",
    [
        ({"batch_first": False}, 2, TypeError, "batch_first=False"),
        ({"batch_first": True, "add_bias_kv": True}, 2, TypeError, "bias_k"),
        ({"batch_first": True, "add_zero_attn": True}, 2, TypeError, "add_zero_attn"),
        ({"batch_first": True}, 3, ValueError, "num_kv_heads must divide the 4 heads"),
    ],
)
def test_multihead_attention_that_cannot(keywords, wanted, error, message):
    with pytest.raises(error, match=message):
        mha_to_gqa(nn.MultiheadAttention(32, 4, **keywords), wanted)
