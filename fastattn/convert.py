"""Turning a model with one K and V head a query head into one whose query heads share them: `mha_to_gqa`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .nn import GroupedQueryAttention


@dataclass
class _Plan:
    """One attention module: its path, K and V projections, and heads."""

    path: str
    module: nn.Module
    config: object | None
    heads: int
    kv_heads: int
    head_dim: int


def _pooled(t: Tensor, kv_heads: int, wanted: int) -> Tensor:
    """Means over neighbouring heads: t [kv_heads * D, ...] -> [wanted * D, ...], summed in float32 at least."""
    heads = t.detach().unflatten(0, (wanted, kv_heads // wanted, t.shape[0] // kv_heads))
    return heads.to(torch.promote_types(t.dtype, torch.float32)).mean(1).flatten(0, 1).to(t.dtype)


def _plan(path: str, module: nn.Module, wanted: int) -> _Plan | None:
    """What is to be done to a module; None where it is no attention of the Llama kind."""
    projections = [getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    config = getattr(module, "config", None)
    ours = isinstance(module, GroupedQueryAttention)
    if not all(isinstance(p, nn.Module) for p in projections):
        return None
    if not ours and not hasattr(config, "num_key_value_heads"):
        return None
    at = path or type(module).__name__
    for name, p in zip(("q_proj", "k_proj", "v_proj"), projections):
        if type(p) is not nn.Linear or type(p.weight) is not nn.Parameter or not p.weight.is_floating_point():
            raise TypeError(
                f"{at}.{name} must be a torch.nn.Linear with a floating-point Parameter, got {type(p).__name__}; "
                "merge adapters and convert before quantising"
            )
        if p.weight.is_meta:
            raise ValueError(f"{at}.{name} is on the meta device; load the weights first")
    q, k, v = projections
    if ours:
        heads, kv_heads = module.num_heads, module.num_kv_heads
    else:
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    head_dim = getattr(module, "head_dim", None) or q.out_features // heads
    if (k.out_features, v.out_features) != (kv_heads * head_dim,) * 2:
        raise ValueError(
            f"{at}: k_proj and v_proj must have {kv_heads} heads of {head_dim}, got {k.out_features} and "
            f"{v.out_features} features"
        )
    if kv_heads % wanted or heads % wanted:
        raise ValueError(
            f"num_kv_heads must divide the {kv_heads} key heads and {heads} query heads of {at}, got {wanted}"
        )
    norm = getattr(getattr(module, "k_norm", None), "weight", None)
    if norm is not None and norm.numel() != head_dim:
        raise TypeError(f"{at}.k_norm spans all key heads: means of heads would not be means of its results")
    return _Plan(path, module, None if ours else config, heads, kv_heads, head_dim)


def _of_multihead(module: nn.MultiheadAttention, wanted: int) -> GroupedQueryAttention:
    heads = module.num_heads
    for name, refused in (
        ("batch_first=False", not module.batch_first),
        ("bias_k and bias_v", module.bias_k is not None),
        ("add_zero_attn=True", module.add_zero_attn),
    ):
        if refused:
            raise TypeError(f"the MultiheadAttention has {name}, which GroupedQueryAttention has not")
    if heads % wanted:
        raise ValueError(
            f"num_kv_heads must divide the {heads} heads of the MultiheadAttention, got {wanted}"
        )
    bias, p = module.in_proj_bias, module.out_proj.weight
    made = GroupedQueryAttention(
        module.embed_dim,
        heads,
        wanted,
        kdim=module.kdim,
        vdim=module.vdim,
        bias=bias is not None,
        out_bias=module.out_proj.bias is not None,
        dropout=module.dropout,
        device=p.device,
        dtype=p.dtype,
    ).train(module.training)
    if module.in_proj_weight is None:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    else:
        weights = module.in_proj_weight.chunk(3)
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    with torch.no_grad():
        for name, w, b in zip("qkv", weights, biases):
            linear = getattr(made, f"{name}_proj")
            kept = heads if name == "q" else wanted
            linear.weight.copy_(_pooled(w, heads, kept))
            if b is not None:
                linear.bias.copy_(_pooled(b, heads, kept))
        made.o_proj.load_state_dict(module.out_proj.state_dict())
    return made


def mha_to_gqa(model: nn.Module, num_kv_heads: int) -> nn.Module:
    """Gives an attention module, or all of those in a model, fewer key and value heads, in place.

    Each new head is the mean of the heads it replaces, the start for uptraining that GQA (arXiv:2305.13245,
    section 2.1) found best. Query heads that shared a head still do: head h reads key head
    h // (heads // num_kv_heads). The weights are new parameters; an optimizer has to be made anew. The config of a
    transformers model is updated, so that `save_pretrained` and `from_pretrained` agree with it.

    Args:
        model: a transformers model of Llama's kind (separate q_proj, k_proj and v_proj, a config with
            num_key_value_heads), or one attention module of it. A single module's config is left alone: its
            other layers still have their heads. Or fastattn.nn.GroupedQueryAttention, or a model that has some. Or one
            MultiheadAttention, of torch or fastattn.nn, with batch_first=True.
        num_kv_heads: how many; divides the present number.

    Returns:
        The same object; for a MultiheadAttention, whose parameters cannot hold fewer heads, a new
        GroupedQueryAttention.

    Raises:
        TypeError: nothing in it is such an attention, or a projection is no plain Linear.
        ValueError: num_kv_heads does not divide the heads. Nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(num_kv_heads, bool) or not isinstance(num_kv_heads, int) or num_kv_heads < 1:
        raise ValueError(f"num_kv_heads must be an int of at least 1, got {num_kv_heads!r}")
    if isinstance(model, nn.MultiheadAttention):
        return _of_multihead(model, num_kv_heads)
    plans = [p for path, m in model.named_modules() if (p := _plan(path, m, num_kv_heads)) is not None]
    if not plans:
        raise TypeError(
            f"{type(model).__name__} has no attention with q_proj, k_proj, v_proj and a config with "
            "num_key_value_heads, and no fastattn.nn.GroupedQueryAttention"
        )
    pooled = []
    for plan in plans:
        for linear in (plan.module.k_proj, plan.module.v_proj):
            for name in ("weight", "bias"):
                p = getattr(linear, name)
                if p is not None:
                    new = nn.Parameter(_pooled(p, plan.kv_heads, num_kv_heads), p.requires_grad)
                    pooled.append((linear, name, new))
    for linear, name, new in pooled:
        setattr(linear, name, new)
        linear.out_features = new.shape[0]
    for plan in plans:
        if plan.config is not None:
            plan.module.num_key_value_groups = plan.heads // num_kv_heads
        for name in ("num_key_value_heads", "num_kv_heads"):
            if hasattr(plan.module, name):
                setattr(plan.module, name, num_kv_heads)
        if plan.config is not None and plan.module is not model:
            plan.config.num_key_value_heads = num_kv_heads
    return model
