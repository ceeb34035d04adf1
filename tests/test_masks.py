"""Masks: every family against its formula bit for bit, and its lowered form."""

import pytest
import torch
from mask_checks import assert_lowers, blocks, bools, cuts, decode, ints

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
    lower,
    native,
)
from fastattn.masks.words import granules

pytestmark = pytest.mark.usefixtures("one_thread")


SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 64, 64),
    (2, 2, 65, 63),
    (2, 1, 127, 257),
    (1, 2, 257, 131),
    (3, 1, 1, 200),
    (1, 1, 200, 1),
    (1, 2, 128, 192),
    (1, 1, 320, 320),
]


# Whether the family is ranges, bits, or either by its data.
FAMILIES = {
    "causal": ("ranges", lambda B, H, Sq, Sk: Causal()),
    "causal lower right": ("ranges", lambda B, H, Sq, Sk: CausalLowerRight()),
    "window": ("ranges", lambda B, H, Sq, Sk: SlidingWindow(7, 3)),
    "window to the left": ("ranges", lambda B, H, Sq, Sk: SlidingWindow(100, None)),
    "window to the right": ("ranges", lambda B, H, Sq, Sk: SlidingWindow(right=70)),
    "window lower right": ("ranges", lambda B, H, Sq, Sk: SlidingWindow(33, 0, lower_right=True)),
    "padding right": ("ranges", lambda B, H, Sq, Sk: KeyPadding(ints(Sk + 1, B))),
    "padding left": ("ranges", lambda B, H, Sq, Sk: KeyPadding(ints(Sk + 1, B), side="left")),
    "padding one length": ("ranges", lambda B, H, Sq, Sk: KeyPadding(Sk // 2)),
    "padding bool": ("ranges", lambda B, H, Sq, Sk: KeyPadding(torch.arange(Sk) >= ints(Sk + 1, B, 1))),
    "padding bool with gaps": ("any", lambda B, H, Sq, Sk: KeyPadding(bools(B, Sk))),
    "documents": ("ranges", lambda B, H, Sq, Sk: Documents(cuts(Sq, 3, 0), cuts(Sk, 3, 1))),
    "documents by sorted ids": (
        "ranges",
        lambda B, H, Sq, Sk: Documents(ids=ints(4, B, Sq).sort().values, ids_k=ints(4, B, Sk).sort().values),
    ),
    "documents by scattered ids": ("any", lambda B, H, Sq, Sk: Documents(ids=ints(3, Sq), ids_k=ints(3, Sk))),
    "prefix": ("ranges", lambda B, H, Sq, Sk: PrefixLM(ints(Sk + 1, B))),
    "prefix lower right": ("ranges", lambda B, H, Sq, Sk: PrefixLM(Sk // 3, lower_right=True)),
    "chunked": ("ranges", lambda B, H, Sq, Sk: Chunked(50)),
    "chunked lower right": ("ranges", lambda B, H, Sq, Sk: Chunked(33, lower_right=True)),
    "longformer": ("any", lambda B, H, Sq, Sk: Longformer(10, 2)),
    "longformer positions": ("any", lambda B, H, Sq, Sk: Longformer(64, [0, max(Sq, Sk) - 1])),
    "longformer no global": ("ranges", lambda B, H, Sq, Sk: Longformer(9)),
    "big bird": ("any", lambda B, H, Sq, Sk: BigBird()),
    "big bird 16": ("any", lambda B, H, Sq, Sk: BigBird(16, per_head=True, global_blocks=0)),
    "big bird 24": ("any", lambda B, H, Sq, Sk: BigBird(24, window=1, random=5, global_blocks=1, seed=3)),
    "big bird 128": ("any", lambda B, H, Sq, Sk: BigBird(128, random=1, global_blocks=0)),
    "strided": ("any", lambda B, H, Sq, Sk: Strided(10)),
    "strided 64": ("any", lambda B, H, Sq, Sk: Strided(64)),
    "strided 1": ("any", lambda B, H, Sq, Sk: Strided(1)),
    "fixed": ("any", lambda B, H, Sq, Sk: Fixed(10, 2)),
    "fixed 128": ("any", lambda B, H, Sq, Sk: Fixed(128, 8)),
    "blocks of 64": ("any", lambda B, H, Sq, Sk: BlockSparse(bools(blocks(Sq, 64), blocks(Sk, 64)))),
    "blocks of 16": ("any", lambda B, H, Sq, Sk: BlockSparse(bools(H, blocks(Sq, 16), blocks(Sk, 16)), 16)),
    "blocks of 8": ("any", lambda B, H, Sq, Sk: BlockSparse(bools(blocks(Sq, 8), blocks(Sk, 8)), 8)),
    "blocks of 100": (
        "any",
        lambda B, H, Sq, Sk: BlockSparse(bools(B, H, blocks(Sq, 100), blocks(Sk, 100)), 100),
    ),
    "dense": ("any", lambda B, H, Sq, Sk: Dense(bools(Sq, Sk))),
    "dense by batch": ("any", lambda B, H, Sq, Sk: Dense(bools(B, 1, Sq, Sk, share=0.99))),
    "dense by head": ("any", lambda B, H, Sq, Sk: Dense(bools(H, Sq, Sk, share=0.01))),
    "dense keys": ("any", lambda B, H, Sq, Sk: Dense(bools(H, 1, Sk))),
    "dense rows": ("ranges", lambda B, H, Sq, Sk: Dense(bools(B, 1, Sq, 1))),
    "dense nothing": ("any", lambda B, H, Sq, Sk: Dense(torch.zeros(Sq, Sk, dtype=torch.bool))),
    "dense everything": ("ranges", lambda B, H, Sq, Sk: Dense(torch.ones(Sq, Sk, dtype=torch.bool))),
    "predicate": ("any", lambda B, H, Sq, Sk: Predicate(lambda b, h, i, j: (i + j) % 3 == 0)),
    "predicate by head": ("any", lambda B, H, Sq, Sk: Predicate(lambda b, h, i, j: (i + j) % (h + 2) == 0)),
    "predicate by batch": ("any", lambda B, H, Sq, Sk: Predicate(lambda b, h, i, j: i * b <= j)),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_lowering_equals_formula(family, shape, path):
    form, make = FAMILIES[family]
    mask = make(*shape)
    lowered = assert_lowers(mask, *shape)
    if form == "ranges":
        assert not lowered.has_bits
    assert_lowers(~mask, *shape)
    assert_lowers(mask & Causal(), *shape)
    assert_lowers(mask | SlidingWindow(3, 40), *shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoders_agree(family):
    """Lowered.to_dense against the definition read entry by entry in plain Python."""
    shape = (2, 2, 70, 133)
    lowered = lower(FAMILIES[family][1](*shape), *shape[:2], 1, *shape[2:], "cpu")
    assert torch.equal(lowered.to_dense(), decode(lowered))


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("family", [f for f in FAMILIES if "positions" not in f])
def test_empty_sizes(family, size):
    lowered = assert_lowers(FAMILIES[family][1](2, 2, *size), 2, 2, *size)
    assert not lowered.has_bits


def test_padding_polarity_and_alignment():
    assert KeyPadding([2]).to_dense(1, 4)[0, 0, 0].tolist() == [True, True, False, False]
    assert KeyPadding([1], side="left").to_dense(1, 4)[0, 0, 0].tolist() == [False, False, False, True]
    assert Causal().to_dense(2, 4)[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0]]
    assert CausalLowerRight().to_dense(2, 4)[0, 0].int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert SlidingWindow(1, 0, lower_right=True).to_dense(1, 4)[0, 0, 0].int().tolist() == [0, 0, 1, 1]


def test_big_bird_counts_its_blocks():
    """A row block far from the edges sees global + window + random blocks, all different."""
    mask = BigBird(64, window=3, random=3, global_blocks=2, seed=1)
    seen = mask.to_dense(64 * 32, 64 * 32)[0, 0, ::64, ::64].sum(1)
    assert seen[5:30].tolist() == [8] * 25
    assert seen[:2].tolist() == [32, 32]
    other = BigBird(64, seed=2).to_dense(64 * 32, 64 * 32)
    assert not torch.equal(mask.to_dense(64 * 32, 64 * 32), other)
    assert torch.equal(BigBird(64, seed=2).to_dense(64 * 32, 64 * 32), other)


def test_conjunction_of_ranges_stays_ranges():
    mask = Causal() & SlidingWindow(255) & KeyPadding([100, 300]) & Documents([0, 200, 512])
    lowered = assert_lowers(mask, 2, 4, 512, 512)
    assert not lowered.has_bits
    assert (lowered.band_lo, lowered.band_hi) == (-255, 0)
    assert lowered.lo.stride()[:2] == (0, 0)
    lengths = assert_lowers(Causal() & KeyPadding([100, 300]), 2, 4, 512, 512)
    assert lengths.hi.stride() == (1, 0, 0), "one number a batch item"


@pytest.mark.parametrize(
    "mask",
    [
        Causal() | KeyPadding(100),
        Causal() | KeyPadding([100, 3]),
        SlidingWindow(10, 0) | SlidingWindow(0, 20),
        SlidingWindow(300, None) | Causal(),
        ~Causal(),
        ~SlidingWindow(left=4),
        ~KeyPadding([3, 70]),
        ~KeyPadding([3, 70], side="left"),
        ~PrefixLM(50),
        ~(Causal() & KeyPadding([3, 70])) & SlidingWindow(40, 40),
        ~(SlidingWindow(left=4) | KeyPadding([3, 70])),
        Documents([0, 50, 128]) | Documents([0, 100, 128]),
        Causal() & ~Causal(),
        Causal() | ~Causal(),
        Dense((torch.arange(128) < 40).expand(128, 128)) & Causal(),
    ],
    ids=repr,
)
def test_one_range_results(mask):
    assert not assert_lowers(mask, 2, 2, 128, 128).has_bits


def test_everything_is_recognised(path):
    for mask in (Causal() | ~Causal(), KeyPadding(64), CausalLowerRight(), SlidingWindow(), Chunked(100)):
        lowered = assert_lowers(mask, 1, 1, 1, 64)
        assert lowered.is_everything or isinstance(mask, (KeyPadding, Chunked))
    for dtype in (torch.bool, torch.float32):
        tensor = torch.ones(130, 70, dtype=dtype) if dtype == torch.bool else torch.zeros(130, 70)
        assert from_tensor(tensor, 2, 2, 130, 70).is_everything


def test_dense_under_padding_stays_one_plane():
    mask = Dense(bools(200, 200)) & KeyPadding([5, 200, 100])
    lowered = assert_lowers(mask, 3, 4, 200, 200)
    assert lowered.block_offsets.shape == (1, 1, 5)
    assert lowered.hi.stride() == (1, 0, 0)


def test_ranges_prune_the_lists(path):
    whole = assert_lowers(Predicate(lambda b, h, i, j: (i + j) % 2 == 0), 1, 1, 640, 640)
    causal = assert_lowers(Causal() & Predicate(lambda b, h, i, j: (i + j) % 2 == 0), 1, 1, 640, 640)
    assert (len(whole.block_list), len(causal.block_list)) == (100, 55)


def test_equal_tiles_are_stored_once(path):
    lowered = assert_lowers(Strided(128), 1, 1, 2048, 2048)
    assert len(lowered.bit_tiles) == 2
    assert len(assert_lowers(Dense(torch.ones(640, 640).tril().bool()), 1, 1, 640, 640).bit_tiles) == 1
    random = bools(64, 64).repeat(6, 6)
    assert len(assert_lowers(Dense(random), 1, 1, 384, 384).bit_tiles) == 1


def test_heads_differ():
    lowered = lower(Dense(bools(4, 70, 70)), 1, 4, 2, 70, 70, "cpu")
    assert lowered.differs_in_group(2)
    assert not lowered.differs_in_group(4)
    assert not lower(Dense(bools(70, 70)) & Causal(), 1, 4, 2, 70, 70, "cpu").differs_in_group(2)
    assert lower(Dense(torch.arange(9) < ints(9, 4, 1, 1)), 1, 4, 2, 9, 9, "cpu").differs_in_group(2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mask", [Strided(10), Longformer(10, 2), BigBird(16, per_head=True)], ids=repr)
def test_transpose(mask, shape, path):
    lowered = lower(mask, *shape[:2], 1, *shape[2:], "cpu")
    if not lowered.has_bits:
        with pytest.raises(ValueError, match="ranges alone"):
            lowered.transpose()
        return
    offsets, blocks = lowered.transpose()
    assert lowered.transpose()[1] is blocks, "made once"
    n_q, n_k = granules(shape[2]), granules(shape[3])
    assert offsets.shape == (*lowered.block_offsets.shape[:2], n_k + 1)
    assert offsets.dtype == blocks.dtype == torch.int32
    forward, backward = set(), set()
    for plane, row in enumerate(lowered.block_offsets.view(-1, n_q + 1).tolist()):
        for q in range(n_q):
            forward |= {(plane, q, k, t) for k, t in lowered.block_list[row[q] : row[q + 1]].tolist()}
    for plane, row in enumerate(offsets.view(-1, n_k + 1).tolist()):
        for k in range(n_k):
            entries = blocks[row[k] : row[k + 1]].tolist()
            assert entries == sorted(entries)
            backward |= {(plane, q, k, t) for q, t in entries}
    assert forward == backward
    assert len(blocks) == len(forward)


def test_both_builders_agree(monkeypatch):
    """The C++ and the torch builder: the same lists; tiles may be numbered in another order."""
    for mask in (Strided(10), BigBird(16, per_head=True), Longformer(70, [3, 99]), KeyPadding(bools(2, 300))):
        forms = []
        for enabled in (True, False):
            monkeypatch.setattr(native, "enabled", enabled)
            forms.append(lower(mask, 2, 3, 3, 300, 300, "cpu"))
        one, two = forms
        assert torch.equal(one.block_offsets, two.block_offsets)
        assert torch.equal(one.block_list[:, 0], two.block_list[:, 0])
        tiles = [torch.cat([f.bit_tiles, f.bit_tiles.new_full((1, 64), -1)]) for f in forms]
        assert torch.equal(tiles[0][one.block_list[:, 1].long()], tiles[1][two.block_list[:, 1].long()])


def test_sliced_mask_of_a_larger_one():
    mask = Dense(bools(300, 300)[17:217, 31:131])
    assert_lowers(mask, 1, 2, 200, 100)


@pytest.mark.parametrize("family", FAMILIES)
def test_visible_fraction(family):
    B, H, Sq, Sk = shape = (2, 2, 130, 200)
    mask = FAMILIES[family][1](*shape)
    dense = mask.to_dense(Sq, Sk, B, H)
    assert mask.visible_fraction(Sq, Sk, B=B, H=H) == pytest.approx(dense.float().mean().item())
    padded = torch.nn.functional.pad(dense, (0, 56, 0, 62)).view(B, H, 3, 64, 4, 64)
    share = padded.any(5).any(3).float().mean().item()
    assert mask.visible_fraction(Sq, Sk, granules=True, B=B, H=H) == pytest.approx(share)
