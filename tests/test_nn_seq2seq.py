"""fastattn.nn.Transformer as a whole against torch.nn's, and the gradients of masks that add to the scores."""

import warnings

import pytest
import torch
from pairwise import name_of, pairwise
from test_nn_transformer import LAYER_FACTORS, E, H, L, S, compare, draw, keywords_of, options_of, randomised

from fastattn import nn as fnn

CASES = pairwise(**LAYER_FACTORS, custom=("", "encoder", "decoder", "torch's encoder", "torch's decoder"))


def made(namespace, case):
    """A Transformer of either namespace, from the same random numbers; custom stacks of it, or always of torch."""
    kind, which = case["custom"].removeprefix("torch's ").strip(), case["custom"].startswith("torch's")
    custom = {}
    common = options_of(case)
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind:
            of, name = torch.nn if which else namespace, kind.capitalize()
            layer = getattr(of, f"Transformer{name}Layer")(E, H, 24, **common)
            custom[f"custom_{kind}"] = getattr(of, f"Transformer{name}")(layer, 1)
        return namespace.Transformer(E, H, 1, 2, 32, **common, **custom)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_transformer(case):
    theirs, ours = made(torch.nn, case), made(fnn, case)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other) and all(torch.equal(mine[n], other[n]) for n in mine)
    ours.load_state_dict(randomised(theirs, case).state_dict())
    keywords = keywords_of(case, "src", S, S) | keywords_of(case, "tgt", L, L)
    keywords["src_is_causal"] = keywords.pop("is_causal")
    memory = dict(case, mask="" if case["mask"] in ("causal", "hint", "window") else case["mask"])
    keywords |= keywords_of(memory, "memory", L, S)
    inputs = [draw(case, S, 2), draw(case, L, 7)]
    for module in (ours.train(case["training"]), fnn.Transformer.from_torch(theirs)):
        compare(module, theirs, inputs, keywords, case["dtype"])


def learned(*shape):
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def same_gradients(ours, theirs, inputs, masks):
    """Results, and the gradients of masks among those of all else."""
    y, expected = ours(*inputs, **masks), theirs(*inputs, **masks)
    torch.testing.assert_close(y, expected, atol=1e-9, rtol=1e-9)
    dy = torch.randn_like(y)
    needs = [*masks.values(), *inputs, *theirs.parameters()]
    for a, e in zip(torch.autograd.grad(y, needs, dy), torch.autograd.grad(expected, needs, dy)):
        assert e.any()
        torch.testing.assert_close(a, e, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("name", ["encoder layer", "encoder", "decoder layer", "decoder", "transformer"])
def test_gradients_of_masks(name, per_head):
    """A bias that is learned comes as a mask: alone, and with padding that is learned too."""
    arguments = dict(dropout=0.0, batch_first=True, dtype=torch.float64)
    lead = (3 * H,) if per_head else ()
    x, memory = learned(3, L, E), learned(3, S, E)
    own = dict(mask=learned(*lead, L, L), key_padding_mask=learned(3, L))
    tgt = {f"tgt_{key}": mask for key, mask in own.items()}
    tgt |= dict(memory_mask=learned(*lead, L, S), memory_key_padding_mask=learned(3, S))
    encoder_layer = torch.nn.TransformerEncoderLayer(E, H, 32, **arguments)
    decoder_layer = torch.nn.TransformerDecoderLayer(E, H, 32, **arguments)
    src = {f"src_{key}": mask for key, mask in own.items()}
    theirs, inputs, masks = {
        "encoder layer": (encoder_layer, [x], src),
        "encoder": (
            torch.nn.TransformerEncoder(encoder_layer, 2),
            [x],
            {"mask": own["mask"], "src_key_padding_mask": own["key_padding_mask"]},
        ),
        "decoder layer": (decoder_layer, [x, memory], tgt),
        "decoder": (torch.nn.TransformerDecoder(decoder_layer, 2), [x, memory], tgt),
        "transformer": (
            torch.nn.Transformer(E, H, 1, 1, 32, **arguments),
            [memory, x],
            tgt | dict(src_mask=learned(*lead, S, S), src_key_padding_mask=learned(3, S)),
        ),
    }[name]
    shared = getattr(fnn, type(theirs).__name__).from_torch(theirs)
    same_gradients(shared, theirs, inputs, masks)
    for key in masks:
        same_gradients(shared, theirs, inputs, {key: masks[key]})
