"""Wrong masks, head maps and scales planted in the modules: the tests that compare with formulas have to fail."""

import pytest
import test_nn_beyond as beyond
import test_nn_seq2seq as whole
import test_nn_transformer as stacks
import torch

from fastattn import functional, masks
from fastattn.nn import decoder, grouped, masking, positions, relative

CASE = dict(
    stacks.CASES[0],
    layout="batch-first",
    activation="gelu",
    padding="pad-right",
    mask="random",
    training=True,
    dtype=torch.float32,
)
WHOLE = dict(CASE, custom="")

KINDS = ("no mask", "flipped", "key heads", "query heads", "scale")


def flipped(mask):
    if isinstance(mask, masks.Prepared):
        return ~mask.lowered.to_dense()
    return None if mask is None else masks.Not(mask)


def planted(kind):
    """`fastattn.attention` with a mistake in it."""
    original = functional.attention

    def attention(q, k, v, **arguments):
        scale = arguments.get("scale") or q.shape[-1] ** -0.5
        if kind == "no mask":
            arguments["mask"] = None
        elif kind == "flipped":
            arguments["mask"] = flipped(arguments["mask"])
        elif kind == "key heads":
            k, v = k.flip(1), v.flip(1)
        elif kind == "query heads":
            q = q.roll(1, 1)
        elif kind == "scale":
            arguments["scale"] = 1.05 * scale
        elif kind == "bias":
            arguments["bias"] = arguments["bias"].roll(1, 1)
        return original(q, k, v, **arguments)

    attention.__kwdefaults__ = original.__kwdefaults__  # explain asks for the names
    return attention


# What is compared with a formula or with torch: (the comparison, kinds beside those of all).
COMPARISONS = {
    "decoder": (lambda: stacks.test_decoder(CASE), ()),
    "transformer": (lambda: whole.test_transformer(WHOLE), ()),
    "grouped": (lambda: beyond.test_grouped_query_attention("norms", torch.float32), ()),
    "multi-query": (lambda: beyond.test_grouped_query_attention("window, narrow heads", torch.float32), ()),
    "shaw": (lambda: beyond.test_shaw(True, True, torch.float32), ("bias",)),
    "shaw, keys alone": (lambda: beyond.test_shaw(False, True, torch.float32), ("bias",)),
    "transformer-xl": (lambda: beyond.test_transformer_xl(5, True, torch.float32), ("bias",)),
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_what_is_planted_in_attention_fails(name, monkeypatch):
    compare, more = COMPARISONS[name]
    for kind in ("", *KINDS, *more):
        if (name, kind) == ("multi-query", "key heads"):
            continue  # there is one
        with monkeypatch.context() as patch:
            patch.setattr(functional, "attention", planted(kind))
            if not kind:
                compare()
                continue
            with pytest.raises(AssertionError, match="not close"):
                compare()
                pytest.fail(f"{name} with a mutant: {kind}")


def one_key_further(lo, hi):
    return masks.Band(lo, hi + 1)


def learns_nothing(t):
    shown, bias = masking_split(t)
    return shown, None if bias is None else bias.detach()


masking_split, gathered, by_distance = masking.split, relative.gathered, positions.by_distance

# (where, what, its mutant, the comparison that has to fail)
PLANTED = {
    "decoder without padding": (
        decoder,
        "combine",
        lambda padding, mask, *sizes, **rest: masking.combine(None, mask, *sizes, **rest),
        lambda: stacks.test_decoder(CASE),
    ),
    "decoder without masks": (
        decoder,
        "combine",
        lambda padding, mask, *sizes, **rest: masking.combine(padding, None, *sizes, **rest),
        lambda: stacks.test_decoder(CASE),
    ),
    "masks that learn nothing": (
        masking,
        "split",
        learns_nothing,
        lambda: whole.test_gradients_of_masks("decoder", False),
    ),
    "grouped sees a key further": (
        grouped,
        "Causal",
        lambda: masks.Band(None, 1),
        lambda: beyond.test_grouped_query_attention("causal", torch.float32),
    ),
    "shaw sees a key further": (
        relative,
        "Causal",
        lambda: masks.Band(None, 1),
        lambda: beyond.test_shaw(True, True, torch.float32),
    ),
    "shaw with distances reversed": (
        relative,
        "gathered",
        lambda values, index: gathered(values, index.t()),
        lambda: beyond.test_shaw(False, False, torch.float32),
    ),
    "transformer-xl sees a key further": (
        relative,
        "Band",
        one_key_further,
        lambda: beyond.test_transformer_xl(5, True, torch.float32),
    ),
    "transformer-xl a distance further": (
        relative,
        "gathered",
        lambda values, index: gathered(values, index.roll(1, -1)),
        lambda: beyond.test_transformer_xl(5, False, torch.float32),
    ),
    "t5 with distances reversed": (
        positions,
        "by_distance",
        lambda values, Sq, Sk: by_distance(values.flip(-1), Sq, Sk),
        lambda: beyond.test_t5_relative_bias(True),
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_beside_attention_fails(name, monkeypatch):
    where, what, mutant, compare = PLANTED[name]
    compare()
    monkeypatch.setattr(where, what, mutant)
    with pytest.raises((AssertionError, RuntimeError)):
        compare()
        pytest.fail("the mutant passed")
