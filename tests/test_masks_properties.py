"""Random expressions of the mask algebra: the lowering equals the formula, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_checks import assert_lowers, assert_well_formed

from fastattn.masks import (
    BigBird,
    BlockSparse,
    Causal,
    CausalLowerRight,
    Chunked,
    Dense,
    Documents,
    Fixed,
    KeyPadding,
    Longformer,
    Predicate,
    PrefixLM,
    SlidingWindow,
    Strided,
    from_tensor,
    native,
)

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = st.sampled_from([1, 2, 7, 63, 64, 65, 97, 127, 128, 129, 191, 200])


def bools(draw, *shape):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return torch.rand(*shape, generator=generator) < draw(st.sampled_from([0.02, 0.5, 0.98, 1.0]))


@st.composite
def leaves(draw, B, H, Sq, Sk):
    """Any mask that fits the shape."""
    limit = st.none() | st.integers(0, 150)
    size = st.integers(1, 140)
    lengths = st.integers(0, Sk) | st.lists(st.integers(0, Sk), min_size=B, max_size=B)
    block = draw(st.sampled_from([1, 5, 8, 16, 32, 64, 100, 128]))
    layout = (-(-Sq // block), -(-Sk // block))
    plane = (draw(st.sampled_from([1, B])), draw(st.sampled_from([1, H])))
    rows, keys = draw(st.sampled_from([1, Sq])), draw(st.sampled_from([1, Sk]))
    kind = draw(st.integers(0, 14))
    if kind == 0:
        return draw(st.sampled_from([Causal(), CausalLowerRight()]))
    if kind == 1:
        return SlidingWindow(draw(limit), draw(limit), lower_right=draw(st.booleans()))
    if kind == 2:
        return KeyPadding(draw(lengths), side=draw(st.sampled_from(["left", "right"])))
    if kind == 3:
        return KeyPadding(bools(draw, B, Sk))
    if kind == 4:
        cuts = [sorted(draw(st.lists(st.integers(0, S), min_size=2, max_size=2))) for S in (Sq, Sk)]
        return Documents([0, *cuts[0], Sq], [0, *cuts[1], Sk])
    if kind == 5:
        ids = [bools(draw, B, S).to(torch.int64) for S in (Sq, Sk)]
        if draw(st.booleans()):
            ids = [x.sort(dim=1).values for x in ids]
        return Documents(ids=ids[0], ids_k=ids[1])
    if kind == 6:
        return PrefixLM(draw(lengths), lower_right=draw(st.booleans()))
    if kind == 7:
        return Chunked(draw(size), lower_right=draw(st.booleans()))
    if kind == 8:
        positions = st.lists(st.integers(0, max(Sq, Sk) - 1), max_size=3)
        return Longformer(draw(st.integers(0, 100)), draw(st.integers(0, 70) | positions))
    if kind == 9:
        window, seed = draw(st.sampled_from([1, 3])), draw(st.integers(0, 99))
        drawn, first = draw(st.integers(0, 4)), draw(st.integers(0, 2))
        return BigBird(max(block, 5), window, drawn, first, seed=seed, per_head=draw(st.booleans()))
    if kind == 10:
        return Strided(draw(size))
    if kind == 11:
        stride = draw(size)
        return Fixed(stride, draw(st.integers(1, stride)))
    if kind == 12:
        return BlockSparse(bools(draw, *plane, *layout), block)
    if kind == 13:
        return Dense(bools(draw, *plane, rows, keys))
    step = draw(st.integers(1, 5))
    return draw(
        st.sampled_from(
            [
                Predicate(lambda b, h, i, j: (i + j) % step == 0),
                Predicate(lambda b, h, i, j: (i * (b + 1) + j) % 3 <= h),
                Predicate(lambda b, h, i, j: j >= step * b),
            ]
        )
    )


@st.composite
def calls(draw):
    """A mask expression and a shape it fits."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 3), LENGTHS, LENGTHS))
    mask = draw(
        st.recursive(
            leaves(*shape),
            lambda part: st.one_of(
                st.builds(lambda a, b: a & b, part, part),
                st.builds(lambda a, b: a | b, part, part),
                st.builds(lambda a: ~a, part),
            ),
            max_leaves=5,
        )
    )
    return mask, shape


@settings(max_examples=250, deadline=None)
@given(calls(), st.booleans())
def test_lowering_equals_formula(call, in_torch):
    mask, shape = call
    native.enabled = not in_torch
    try:
        lowered = assert_lowers(mask, *shape)
    finally:
        native.enabled = True
    dense = mask.to_dense(*shape[2:], *shape[:2])
    assert abs(lowered.visible_fraction() - dense.double().mean().item()) < 1e-9


@settings(max_examples=100, deadline=None)
@given(calls())
def test_a_tensor_lowers_to_what_it_shows(call):
    """The mask as a tensor, bool or additive, shows the same."""
    mask, shape = call
    dense = mask.to_dense(*shape[2:], *shape[:2])
    additive = torch.zeros(dense.shape).masked_fill_(~dense, float("-inf"))
    for tensor in (dense, additive, additive.bfloat16()):
        lowered = from_tensor(tensor, *shape)
        assert_well_formed(lowered)
        assert torch.equal(lowered.to_dense(), dense)
        assert lowered.bias is None


@settings(max_examples=60, deadline=None)
@given(calls(), st.randoms(use_true_random=False))
def test_laws(call, random):
    """What the algebra promises, through the lowering."""
    mask, shape = call
    other = random.choice([Causal(), Chunked(37), Strided(9), ~SlidingWindow(5, 20)])
    pairs = (
        (~(mask & other), ~mask | ~other),
        (~(mask | other), ~mask & ~other),
        (mask & (mask | other), mask),
        (mask | ~mask, Causal() | ~Causal()),
    )
    for one, two in pairs:
        assert torch.equal(assert_lowers(one, *shape).to_dense(), assert_lowers(two, *shape).to_dense())
