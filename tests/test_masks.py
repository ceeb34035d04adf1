"""Masks: every family against its formula bit for bit, its lowered form, its errors."""

import subprocess
import sys

import pytest
import torch
from mask_checks import assert_lowers, assert_well_formed, decode

from fastattn import attention
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
    Not,
    Predicate,
    PrefixLM,
    SlidingWindow,
    Strided,
    from_tensor,
    lower,
    native,
    prepare,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Thousands of small calls: waking threads would take longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def generator(seed):
    return torch.Generator().manual_seed(seed)


def bools(*shape, share=0.5, seed=0):
    return torch.rand(*shape, generator=generator(seed)) < share


def ints(high, *shape, seed=0):
    return torch.randint(0, high, shape, generator=generator(seed))


def cuts(S, count, seed):
    """Document bounds, some documents perhaps empty."""
    inner = ints(S + 1, count, seed=seed).sort().values.tolist()
    return [0, *inner, S]


def blocks(S, block):
    return -(-S // block)


@pytest.fixture(params=["native", "torch"])
def path(request, monkeypatch):
    """The C++ ops, and the torch code that serves other devices."""
    monkeypatch.setattr(native, "enabled", request.param == "native")
    return request.param


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
    n_q, n_k = blocks_of(shape[2]), blocks_of(shape[3])
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


def blocks_of(size):
    return -(-size // 64)


def additive(visible, dtype=torch.float32):
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [(130, 70), (3, 130, 70), (1, 130, 70), (2, 3, 130, 70), (2, 1, 130, 70), (2, 1, 1, 70), (130, 1)],
)
def test_tensor(shape, dtype, path):
    visible = bools(*shape, share=0.7)
    tensor = visible if dtype == torch.bool else additive(visible, dtype)
    lowered = from_tensor(tensor, 2, 3, 130, 70)
    assert_well_formed(lowered)
    assert lowered.bias is None
    assert torch.equal(lowered.to_dense(), visible.expand(2, 3, 130, 70))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_tensor_views(dtype, path):
    """Slices of larger masks, transposed and stepped ones, offsets that are no multiple of anything."""
    big = bools(3, 5, 400, 403)
    base = big if dtype == torch.bool else additive(big)
    views = [
        lambda t: t[1:3, 1:4, 13:143, 7:77],
        lambda t: t[:2, :3, ::3, 5:75][:, :, :130],
        lambda t: t[:2, 2:3, :130, 1:141:2].expand(2, 3, 130, 70),
        lambda t: t[0, 0, 3:73, 9:139].T,
        lambda t: t[:2, :1, :1, 11:81].expand(2, 3, 130, 70),
        lambda t: t[:1, :3, 40:170, 9:10].expand(2, 3, 130, 70),
        lambda t: t[1, 1, 1, 1].expand(130, 70),
        lambda t: t[:2, 0, 7, 3:73].unsqueeze(1).unsqueeze(1),
        lambda t: t.flip(3)[:2, :3, 1:131, 2:72],
        lambda t: t.permute(0, 1, 3, 2)[:2, 1:4, 100:230, 5:75],
    ]
    for view in views:
        lowered = from_tensor(view(base), 2, 3, 130, 70)
        assert_well_formed(lowered)
        assert torch.equal(lowered.to_dense(), view(big).expand(2, 3, 130, 70))


def test_stride_0_is_scanned_once(path):
    lowered = from_tensor(bools(130, 70).expand(4, 6, 130, 70), 4, 6, 130, 70)
    assert lowered.block_offsets.shape == (1, 1, 4)
    keys = (torch.arange(70) < 33).expand(4, 1, 130, 70)
    assert not from_tensor(keys, 4, 6, 130, 70).has_bits
    rows = bools(4, 1, 130, 1).expand(4, 6, 130, 70)
    assert not from_tensor(rows, 4, 6, 130, 70).has_bits


def test_additive_bias_is_kept(path):
    bias = torch.randn(2, 1, 130, 70)
    hidden = ~bools(130, 70, share=0.8)
    mixed = bias.masked_fill(hidden, float("-inf"))
    lowered = from_tensor(mixed, 2, 3, 130, 70)
    assert lowered.bias.shape == (2, 3, 130, 70)
    assert lowered.bias.stride(1) == 0
    assert lowered.bias.data_ptr() == mixed.data_ptr()
    assert torch.equal(lowered.to_dense(), (~hidden).expand(2, 3, 130, 70))
    plain = from_tensor(bias, 2, 3, 130, 70)
    assert plain.is_everything
    assert plain.bias is not None


def test_additive_special_values(path):
    tensor = torch.zeros(4, 70)
    tensor[1, 3] = torch.finfo(torch.float32).min
    lowered = from_tensor(tensor, 1, 1, 4, 70)
    assert lowered.is_everything, "finfo.min is a bias, not a mask"
    assert lowered.bias is not None
    for value in (float("nan"), float("inf"), 1e-38):
        tensor[1, 3] = value
        assert from_tensor(tensor, 1, 1, 4, 70).bias is not None
    assert from_tensor(-torch.zeros(4, 70), 1, 1, 4, 70).bias is None, "-0.0 adds nothing"


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_instruction_set_scans_alike(isa, dtype):
    for S in ((64, 64), (130, 200), (65, 8400)):
        visible = bools(2, 1, *S, share=0.9)
        tensor = visible if dtype == torch.bool else additive(visible, dtype)
        for view in (lambda t: t, lambda t: t[..., 1:], lambda t: t[..., ::2], lambda t: t.mT):
            lowered = from_tensor(view(tensor), 2, 1, *view(tensor).shape[2:])
            assert_well_formed(lowered)
            assert torch.equal(lowered.to_dense(), view(visible))
            assert lowered.bias is None
    if dtype != torch.bool:
        for n, value in enumerate((1.0, float("nan"), float("inf"), torch.finfo(dtype).tiny)):
            tensor = torch.zeros(65, 300, dtype=dtype)
            tensor[3 * n, 299 - 17 * n] = value
            assert from_tensor(tensor, 1, 1, 65, 300).bias is not None
    # A bool that is stored as another number than 1 is true all the same.
    odd = torch.randint(0, 3, (70, 130), dtype=torch.uint8)
    assert torch.equal(from_tensor(odd.view(torch.bool), 1, 1, 70, 130).to_dense()[0, 0], odd != 0)


def test_scan_does_not_depend_on_threads(threads, task_order):
    mask = bools(3, 2, 400, 500, share=0.3)
    mask[1] = mask[0]
    results = []
    for count, order in ((1, 0), (2, 0), (3, 5), (5, 11), (7, 3)):
        threads(count)
        task_order(order)
        lowered = from_tensor(mask, 3, 2, 400, 500)
        results.append((lowered.block_offsets, lowered.block_list, lowered.bit_tiles))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


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


def _patterns(Sk):
    j = torch.arange(Sk)
    cut, end = Sk // 3, Sk - Sk // 4
    yield "all", j >= 0, True
    yield "none", j < 0, True
    yield "prefix", j < cut, True
    yield "suffix", j >= cut, True
    yield "middle", (j >= cut) & (j < end), True
    yield "one key", j == Sk - 1, True
    if Sk > 2:
        yield "a hole", j != Sk // 2, False
        yield "the ends", (j == 0) | (j == Sk - 1), False


@pytest.mark.parametrize("Sk", [1, 2, 63, 64, 65, 128, 200, 64 * 129 + 7])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.float64])
def test_a_tensor_without_rows_is_ranges_where_its_keys_are_an_interval(Sk, dtype, path):
    for name, seen, interval in _patterns(Sk):
        lowest = 0.0 if dtype == torch.bool else torch.finfo(dtype).min
        for finite in (0.0, -0.0, 1.5, lowest, float("nan")):
            planes = torch.stack([seen, torch.ones(Sk, dtype=torch.bool)])[:, None, None]
            if dtype != torch.bool:
                planes = torch.zeros(planes.shape, dtype=dtype).masked_fill_(~planes, float("-inf"))
                planes[1, 0, 0, 0] = finite
            spread = torch.zeros(2, 1, 1, 2 * Sk, dtype=dtype)[..., ::2].copy_(planes)
            for tensor in (planes, spread, planes.expand(2, 3, 1, Sk)):
                m = from_tensor(tensor, 2, 3, 70, Sk)
                wanted = (tensor if dtype == torch.bool else tensor != float("-inf")).expand(2, 3, 70, Sk)
                assert torch.equal(m.to_dense(), wanted), name
                assert m.has_bits != interval, name
                if name == "all" and Sk > 1:
                    assert m.is_everything
                assert (m.bias is not None) == (dtype != torch.bool and finite != 0), name
            if dtype == torch.bool:
                break


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ([], "one tree"),
        ([5, 3, 5, 3], "one tree"),
        ([0, 2], "not there"),
        ([5], "ends early"),
        ([5, 0], "must be positive"),
        ([99], "no node 99"),
        ([4, 0], "no tensor 0"),
    ],
)
def test_the_op_checks_its_program(program, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastattn.mask_build(program, [], 1, 1, 64, 64)


COMPILED = {
    "big bird": lambda q, k, v: attention(q, k, v, mask=BigBird(16, per_head=True)),
    "algebra": lambda q, k, v: attention(q, k, v, mask=Not(Documents([0, 50, 130])) & Strided(10) | Causal()),
    "predicate": lambda q, k, v: attention(q, k, v, mask=Predicate(lambda b, h, i, j: (i + j) % 3 == 0)),
    "lengths": lambda q, k, v: attention(q, k, v, mask=KeyPadding((q[:, 0, 0, 0] * 0 + 70).int()) & Causal()),
    "bool": lambda q, k, v: attention(q, k, v, mask=q[..., :1].detach() + k[:, :1, :, 0].unsqueeze(2) > 0),
    "keys": lambda q, k, v: attention(q, k, v, mask=k[:, :1, :, 0].unsqueeze(2).detach() > 0),
    "additive": lambda q, k, v: attention(q, k, v, mask=k[:, :1, :, 0].detach().relu().unsqueeze(2).log()),
}


@pytest.mark.parametrize("case", COMPILED)
def test_compiles_whole(case):
    """Lowering stands in the graph, sizes that depend on the data included; gradients too."""
    torch._dynamo.reset()
    q = torch.randn(2, 4, 130, 16, requires_grad=True)
    k, v = (torch.randn(2, 2, 130, 16).abs_().sub_(0.1).requires_grad_() for _ in range(2))
    call = COMPILED[case]
    expected, out = call(q, k, v), torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v)
    torch.testing.assert_close(out, expected)
    for grad, wanted in zip(*(torch.autograd.grad(x.sum(), (q, k, v)) for x in (out, expected))):
        torch.testing.assert_close(grad, wanted)


def test_opcheck():
    mask = bools(2, 1, 130, 70, share=0.9)
    torch.library.opcheck(torch.ops.fastattn.mask_scan, (mask,))
    torch.library.opcheck(torch.ops.fastattn.mask_scan, (additive(mask).mT,))
    offsets, blocks, *_ = torch.ops.fastattn.mask_scan(mask)
    torch.library.opcheck(torch.ops.fastattn.mask_transpose, (offsets, blocks, 2))
    torch.library.opcheck(torch.ops.fastattn.mask_build, ([5, 3], [], 1, 1, 100, 200))


# Peak memory of building each family at S = 131072, above what the process holds before. The kernel counts pages
# touched, torch's own included; the peak is reset first.
_PEAK = """
import ctypes, torch
from fastattn.masks import *
S = 131072
trim = getattr(ctypes.CDLL(None), "malloc_trim", bool)

def status(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1])

torch.set_num_threads(1)
ids = torch.arange(S) // 5000 % 7
masks = dict(
    causal=Causal(), window=SlidingWindow(255, 0), padding=KeyPadding([S // 2]),
    gaps=KeyPadding(torch.rand(1, S) < 0.5), documents=Documents([0, 1000, 50000, S]), ids=Documents(ids=ids),
    prefix=PrefixLM(1000), chunked=Causal() & Chunked(8192), longformer=Longformer(512, 64),
    positions=Longformer(512, [0, 70000]), bigbird=BigBird(), bigbird16=BigBird(16), strided=Strided(128),
    strided100=Strided(100), fixed=Fixed(128, 8), blocks=BlockSparse(torch.rand(S // 64, S // 64) < 0.25),
    blocks32=BlockSparse(torch.rand(S // 32, S // 32) < 0.5, 32), union=Documents([0, 1000, S]) | Strided(64),
    complement=~Documents([0, 1000, 50000, S]),
)
lower(Strided(100) | Longformer(10, [3]), 1, 1, 1, 4096, 4096, "cpu")
for name, mask in masks.items():
    trim(0)  # else what was freed before would serve unseen
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    lowered = lower(mask, 1, 16, 16, S, S, "cpu")
    print(name, (status("VmHWM") - before) / 1024)
    del lowered
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_building_at_131072_stays_below_64_mib():
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pytest.skip("the kernel does not let a process reset its peak")
    lines = subprocess.run(
        [sys.executable, "-c", _PEAK], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    peaks = {name: float(peak) for name, peak in map(str.split, lines)}
    assert len(peaks) == 19
    assert {name: peak for name, peak in peaks.items() if peak >= 64} == {}
    # What is ranges holds at most two numbers a row.
    for name in ("causal", "window", "padding", "documents", "prefix", "chunked"):
        assert peaks[name] < 6, name


def test_learned_bias_is_kept_at_zero():
    tensor = additive(bools(130, 70)).requires_grad_()
    lowered = from_tensor(tensor, 1, 1, 130, 70)
    assert lowered.bias.requires_grad
    assert lowered.has_bits


def test_sliced_mask_of_a_larger_one():
    mask = Dense(bools(300, 300)[17:217, 31:131])
    assert_lowers(mask, 1, 2, 200, 100)


def test_repr():
    assert repr(Causal() & KeyPadding([3, 5])) == "Causal() & KeyPadding(lengths=[3, 5])"
    assert repr((Causal() | Chunked(4)) & ~Strided(8)) == "(Causal() | Chunked(size=4)) & ~Strided(stride=8)"
    assert repr(~(Causal() & Causal())) == "~(Causal() & Causal())"
    assert repr(~~Causal()) == "Causal()"
    assert repr(Dense(bools(70, 80))) == "Dense(visible=bool[70, 80])"
    assert repr(SlidingWindow(3, lower_right=True)) == "SlidingWindow(left=3, lower_right=True)"


def test_masks_are_values():
    assert Causal() == Causal()
    assert Chunked(4) != Chunked(5)
    assert (Causal() & Chunked(4)) == (Causal() & Chunked(4))
    assert len({Causal(), Causal(), Strided(3)}) == 2
    padding = KeyPadding([3])
    assert padding == padding
    with pytest.raises(AttributeError):
        Chunked(4).size = 5
    with pytest.raises(TypeError):
        Causal() & torch.ones(2, 2, dtype=torch.bool)


def test_masks_do_not_follow_their_arguments():
    lengths = torch.tensor([3, 5])
    mask = KeyPadding(lengths)
    lengths += 1
    assert mask.lengths.tolist() == [3, 5]


@pytest.mark.parametrize("family", FAMILIES)
def test_visible_fraction(family):
    B, H, Sq, Sk = shape = (2, 2, 130, 200)
    mask = FAMILIES[family][1](*shape)
    dense = mask.to_dense(Sq, Sk, B, H)
    assert mask.visible_fraction(Sq, Sk, B=B, H=H) == pytest.approx(dense.float().mean().item())
    padded = torch.nn.functional.pad(dense, (0, 56, 0, 62)).view(B, H, 3, 64, 4, 64)
    share = padded.any(5).any(3).float().mean().item()
    assert mask.visible_fraction(Sq, Sk, granules=True, B=B, H=H) == pytest.approx(share)


def test_show_text(capsys):
    Causal().show(Sq=4)
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == "Causal(), Sq=4, Sk=4: 62.5% of pairs, 100.0% of blocks visible"
    assert lines == ["█▄  ", "███▄"]
    Longformer(512, 64).show(Sq=8192, width=40)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 21
    assert set(map(len, lines[1:])) == {40}
    assert set("".join(lines[1:])) == set(" ░▒▓█") - {"░"} or "░" in "".join(lines[1:])
    Documents(ids=[0, 0, 1]).show()
    assert "Sq=3, Sk=3" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"b must lie in 0\.\.0, got 1"):
        Causal().show(b=1)


def test_show_draws_the_plane_asked_for(capsys):
    Dense(torch.tensor([[[True]], [[False]]])).show(H=2, h=0)
    assert capsys.readouterr().out.splitlines()[1] == "▀"
    Dense(torch.tensor([[[True]], [[False]]])).show(H=2, h=1)
    assert capsys.readouterr().out.splitlines()[1] == " "


def test_show_picture(tmp_path):
    pytest.importorskip("matplotlib")
    for n, mask in enumerate((Causal(), Longformer(512, 64))):
        path = tmp_path / f"{n}.png"
        mask.show(path, Sq=(100, 8192)[n])
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_show_picture_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'fastattn\[plot\]'"):
        Causal().show("mask.png")


def test_prepare():
    q, k = torch.empty(2, 4, 100, 8), torch.empty(2, 2, 120, 8)
    plan = (Longformer(10, 2) & KeyPadding([3, 120])).prepare(q, k)
    assert lower(plan, 2, 4, 2, 100, 120, "cpu") is plan.lowered
    assert "Longformer" in repr(plan)
    with pytest.raises(
        ValueError, match=r"Longformer.*was prepared for B=2, .*Sq=100, .*this call has .*Sq=99"
    ):
        lower(plan, 2, 4, 2, 99, 120, "cpu")
    with pytest.raises(ValueError, match="Hkv=2.*Hkv=4"):
        lower(plan, 2, 4, 4, 100, 120, "cpu")
    tensor = prepare(bools(100, 120), q, k)
    assert tensor.lowered.has_bits
    assert prepare(None, q, k).lowered.is_everything
    with pytest.raises(ValueError, match="must be"):
        Causal().prepare(q[0], k)
    with pytest.raises(ValueError, match="do not fit"):
        Causal().prepare(q, k[:1])


def at(mask, B=2, H=3, Sq=8, Sk=8):
    return lower(mask, B, H, H, Sq, Sk, "cpu")


ERRORS = [
    (lambda: SlidingWindow(-1, 0), ValueError, "SlidingWindow: left must be at least 0, got -1"),
    (lambda: SlidingWindow(0, 1.5), TypeError, "SlidingWindow: right must be an int or None, got float 1.5"),
    (lambda: SlidingWindow(True), TypeError, "SlidingWindow: left must be an int or None, got bool True"),
    (lambda: Chunked(0), ValueError, "Chunked: size must be at least 1, got 0"),
    (lambda: Strided(0), ValueError, "Strided: stride must be at least 1"),
    (lambda: Fixed(4, 5), ValueError, "Fixed: summary must be at most stride = 4, got 5"),
    (lambda: Longformer(-2), ValueError, "Longformer: window must be at least 0"),
    (lambda: Longformer(2, -1), ValueError, "Longformer: global_tokens must be at least 0"),
    (
        lambda: Longformer(2, [-1]),
        ValueError,
        "Longformer: positions in global_tokens must be at least 0, got -1",
    ),
    (
        lambda: at(Longformer(2, [8])),
        ValueError,
        "Longformer: global_tokens holds position 8, the call has 8",
    ),
    (lambda: BigBird(window=2), ValueError, "BigBird: window must be odd, got 2"),
    (lambda: BigBird(0), ValueError, "BigBird: block must be at least 1"),
    (lambda: KeyPadding([3, -1]), ValueError, r"KeyPadding: lengths\[1\] is -1; lengths must lie in 0..Sk"),
    (
        lambda: at(KeyPadding([3, 9])),
        ValueError,
        r"KeyPadding: lengths\[1\] is 9; lengths must lie in 0..Sk = 8",
    ),
    (lambda: at(KeyPadding([3])), ValueError, "KeyPadding: lengths has batch 1, the call has batch 2"),
    (lambda: KeyPadding([3.5]), TypeError, "KeyPadding: lengths must hold ints"),
    (
        lambda: KeyPadding(torch.ones(2)),
        TypeError,
        "KeyPadding: lengths must be an integer tensor, got torch.float",
    ),
    (
        lambda: KeyPadding(torch.ones(2, 2, dtype=torch.int32)),
        ValueError,
        "lengths must be 0-D or 1-D, got shape",
    ),
    (
        lambda: KeyPadding([3], side="top"),
        ValueError,
        "KeyPadding: side must be 'right' or 'left', got 'top'",
    ),
    (lambda: KeyPadding(bools(2, 8), side="left"), ValueError, "KeyPadding: side goes with lengths"),
    (
        lambda: KeyPadding(bools(8)),
        ValueError,
        r"KeyPadding: a bool tensor must be \[B, Sk\], got shape \(8,\)",
    ),
    (
        lambda: at(KeyPadding(bools(2, 9))),
        ValueError,
        "KeyPadding: the bool tensor has 9 keys, the call has 8",
    ),
    (
        lambda: at(KeyPadding(bools(3, 8))),
        ValueError,
        r"KeyPadding: lengths \(bool\) has batch 3, the call has",
    ),
    (lambda: at(PrefixLM([1, 9])), ValueError, r"PrefixLM: lengths\[1\] is 9; lengths must lie in 0..Sk = 8"),
    (lambda: at(PrefixLM([1, 2, 3])), ValueError, "PrefixLM: lengths has batch 3, the call has batch 2"),
    (lambda: Documents(), ValueError, "Documents: give cu_seqlens or ids, got neither"),
    (lambda: Documents([0, 8], ids=[1]), ValueError, "Documents: give cu_seqlens or ids, got both"),
    (lambda: Documents([0, 8], ids_k=[1]), ValueError, "Documents: ids_k goes with ids, which is not given"),
    (lambda: Documents([1, 8]), ValueError, "Documents: cu_seqlens must begin with 0, got 1"),
    (lambda: Documents([0, 5, 3]), ValueError, "Documents: cu_seqlens must not fall, got 5 then 3 at 2"),
    (lambda: Documents([0]), ValueError, "Documents: cu_seqlens must hold at least 2 bounds, got 1"),
    (lambda: Documents([0, 8], [0, 4, 8]), ValueError, "cu_seqlens bounds 1 documents, cu_seqlens_k 2"),
    (lambda: at(Documents([0, 7])), ValueError, "Documents: cu_seqlens ends at 7, the call has 8 query rows"),
    (lambda: at(Documents([0, 8]), Sk=9), ValueError, "Documents: cu_seqlens ends at 8, the call has 9 keys"),
    (lambda: at(Documents([0, 8], [0, 7])), ValueError, "cu_seqlens_k ends at 7, the call has 8 keys"),
    (
        lambda: at(Documents(ids=[1] * 7)),
        ValueError,
        "Documents: ids has 7 positions, the call has 8 query rows",
    ),
    (
        lambda: at(Documents(ids=torch.ones(3, 8, dtype=torch.int64))),
        ValueError,
        "ids has batch 3, the call has",
    ),
    (lambda: Documents(ids=[0.5]), TypeError, "Documents: ids must hold ints"),
    (lambda: BlockSparse(torch.ones(2, 2)), TypeError, "BlockSparse: layout must be bool, got torch.float32"),
    (lambda: BlockSparse(bools(2)), ValueError, r"BlockSparse: layout must be \[n, m\].* got shape \(2,\)"),
    (
        lambda: at(BlockSparse(bools(1, 1), 4)),
        ValueError,
        r"has 1 blocks of 4 query rows, the call's 8 need 2",
    ),
    (
        lambda: at(BlockSparse(bools(5, 2, 2), 4)),
        ValueError,
        "BlockSparse: layout of shape .* query heads is 3, got 5",
    ),
    (lambda: Dense(torch.ones(8, 8)), TypeError, "Dense: visible must be a bool tensor, got torch.float32"),
    (lambda: Dense(bools(8)), ValueError, "Dense: visible must be"),
    (lambda: at(Dense(bools(8, 9))), ValueError, "Dense: visible of shape .* keys is 8, got 9"),
    (
        lambda: at(Dense(bools(2, 8, 8))),
        ValueError,
        r"query heads is 3, got 2; a tensor of rank 3 is read as \[H, Sq, Sk\]",
    ),
    (lambda: Predicate(3), TypeError, "Predicate: fn must be callable, got int"),
    (
        lambda: at(Predicate(lambda b, h, i, j: i - j)),
        TypeError,
        "must return a bool tensor, got torch.int64",
    ),
    (
        lambda: at(Predicate(lambda b, h, i, j: True)),
        TypeError,
        "Predicate: fn must return a bool tensor, got bool",
    ),
    (
        lambda: at(Predicate(lambda b, h, i, j: torch.ones(8, 3, dtype=torch.bool))),
        ValueError,
        r"Predicate: fn must return a shape that broadcasts to \[B, H, rows, Sk\]",
    ),
    (lambda: at("causal"), TypeError, "mask must be a fastattn.masks mask, a tensor or None, got str"),
    (lambda: at(bools(8)), ValueError, r"attn_mask must have shape \[Sq, Sk\].* got \(8,\)"),
    (
        lambda: at(torch.ones(8, 8, dtype=torch.int32)),
        TypeError,
        "attn_mask must be bool or one of float16.*int32",
    ),
    (
        lambda: at(bools(2, 8, 8)),
        ValueError,
        r"attn_mask of shape \(2, 8, 8\) does not broadcast .*rank 3 is",
    ),
    (lambda: at(bools(7, 8)), ValueError, "query rows is 8, got 7"),
    (
        lambda: from_tensor(torch.zeros(8, 8), 1, 1, 8, 8, q_dtype=torch.float64, name="mask") and None,
        None,
        None,
    ),
    (
        lambda: from_tensor(torch.zeros(8, 8).half(), 1, 1, 8, 8, q_dtype=torch.bfloat16, name="mask"),
        TypeError,
        "mask must be bool or one of bfloat16, float32, got torch.float16",
    ),
]


@pytest.mark.parametrize("case", range(len(ERRORS)))
def test_errors(case):
    call, error, message = ERRORS[case]
    if error is None:
        call()
        return
    with pytest.raises(error, match=message):
        call()


def test_rank_3_is_heads_when_batch_equals_heads():
    mask = bools(3, 8, 8)
    assert torch.equal(from_tensor(mask, 3, 3, 8, 8).to_dense()[0], mask)
