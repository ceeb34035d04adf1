"""NaN in padded rows of fastattn.nn's attention and Transformer: it reaches no other row and no gradient."""

import math

import pytest
import torch
from pairwise import name_of, pairwise

from fastattn import nn as fnn
from fastattn.nn.masking import without_padded_nan

E, H, N, L, S = 24, 4, 3, 4, 6

CASES = pairwise(
    batch_first=(True, False),
    inputs=("self", "memory", "apart", "widths"),
    need_weights=(True, False),
    add_bias_kv=(False, True),
    padding=("bool", "infinite"),
    training=(True, False),
    value=(math.nan, math.inf),
)


def padding_of(kind, dtype=torch.float32):
    """Right, whole and left."""
    padded = torch.zeros(N, S, dtype=torch.bool)
    padded[0, 4:], padded[1], padded[2, :1] = True, True, True
    return padded, padded if kind == "bool" else torch.zeros(N, S, dtype=dtype).masked_fill(padded, -math.inf)


def draw(length, width, batch_first, padded=None, value=math.nan):
    x = torch.randn(N, length, width)
    if padded is not None:
        x[padded] = value
    return (x if batch_first else x.transpose(0, 1).contiguous()).requires_grad_()


def check(results, needs):
    """Results and every gradient of them are finite."""
    assert all(r.isfinite().all() for r in results)
    grads = torch.autograd.grad(sum(r.square().sum() for r in results), needs, allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in grads)
    return grads


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_attention(case):
    widths = dict(kdim=10, vdim=14) if case["inputs"] == "widths" else {}
    batch_first = case["batch_first"]
    module = fnn.MultiheadAttention(
        E, H, 0.2, add_bias_kv=case["add_bias_kv"], batch_first=batch_first, **widths
    )
    padded, mask = padding_of(case["padding"])
    key = draw(S, widths.get("kdim", E), batch_first, padded, case["value"])
    query = key if case["inputs"] == "self" else draw(L, E, batch_first)
    value = key
    if case["inputs"] in ("apart", "widths"):
        value = draw(S, widths.get("vdim", E), batch_first, padded, case["value"])
    out, weights = module.train(case["training"])(
        query, key, value, key_padding_mask=mask, need_weights=case["need_weights"]
    )
    results = [out if batch_first else out.transpose(0, 1), *([] if weights is None else [weights])]
    if case["inputs"] == "self":  # padded rows are queries too, and nobody reads them
        results = [r[~padded] for r in results]
    inputs = list(dict.fromkeys((query, key, value)))
    grads = check(results, [*inputs, *module.parameters()])
    for t, grad in zip(inputs, grads):
        if t is not query or t is key:
            assert not (grad if batch_first else grad.transpose(0, 1))[padded].any()


def test_attention_of_one_sequence():
    module = fnn.MultiheadAttention(E, H)
    padded = torch.tensor([False, True, False, True])
    memory = torch.randn(4, E).masked_fill(padded.unsqueeze(-1), math.nan)
    out, weights = module(torch.randn(3, E), memory, memory, key_padding_mask=padded)
    check([out, weights], list(module.parameters()))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", ["encoder layer", "decoder layer", "decoder", "transformer"])
def test_layers_and_stacks(name, batch_first, norm_first):
    """A loss of the real rows alone, as a model has it; what is padding in src, tgt and memory holds NaN."""
    arguments = dict(dropout=0.1, batch_first=batch_first, norm_first=norm_first)
    padded, mask = padding_of("bool")
    x, memory = (draw(S, E, batch_first, padded) for _ in range(2))
    tgt = dict(tgt_key_padding_mask=mask)
    if name == "encoder layer":
        module = fnn.TransformerEncoderLayer(E, H, 40, **arguments)
        y = module(x, src_key_padding_mask=mask)
        inputs = [x]
    else:
        layer = fnn.TransformerDecoderLayer(E, H, 40, **arguments)
        module, inputs = layer, [x, memory]
        if name == "decoder":
            module = fnn.TransformerDecoder(layer, 2, fnn.LayerNorm(E))
        elif name == "transformer":
            module = fnn.Transformer(E, H, 1, 2, 40, **arguments)
            tgt = tgt | dict(src_key_padding_mask=mask)
        order = (memory, x) if name == "transformer" else (x, memory)
        y = module(*order, memory_key_padding_mask=mask, **tgt)
    y = y if batch_first else y.transpose(0, 1)
    grads = check([y[~padded]], [*inputs, *module.parameters()])
    for grad in grads[: len(inputs)]:
        assert not (grad if batch_first else grad.transpose(0, 1))[padded].any()


def test_only_what_is_not_finite_is_replaced():
    """What padding holds in self-attention is a query too: torch's result for it stays."""
    padded, mask = padding_of("bool")
    x = torch.randn(N, S, E)
    assert without_padded_nan(x, mask, True) is x
    with torch.no_grad():
        poisoned = x.masked_fill(padded.unsqueeze(-1), math.nan)
        assert without_padded_nan(poisoned, mask, True) is poisoned
    x[0, 5, 3], x[1, 1, 0], x[0, 0, 0] = math.nan, -math.inf, math.nan
    y = without_padded_nan(x, mask, True)
    changed = (y != x).any(-1) & y.isfinite().all(-1)
    assert changed.nonzero().tolist() == [[0, 5], [1, 1]] and not y[changed].any()
