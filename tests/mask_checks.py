"""What tests of masks share: a decoder of the lowered form in plain Python, what a lowered mask must be."""

import torch

from fastattn.masks import lower


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


def additive(visible, dtype=torch.float32):
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))


def decode(lowered) -> torch.Tensor:
    """The lowered form read entry by entry, as its definition says; for small shapes."""
    B, H, Sq, Sk = lowered.B, lowered.Hq, lowered.Sq, lowered.Sk
    seen = torch.zeros(B, H, Sq, Sk, dtype=torch.bool)
    for b in range(B):
        for h in range(H):
            grid = None
            if lowered.block_list is not None:
                grid = _decode_plane(lowered, b, h)
            for i in range(Sq):
                first = 0 if lowered.band_lo is None else max(i + lowered.band_lo, 0)
                last = Sk if lowered.band_hi is None else min(i + lowered.band_hi + 1, Sk)
                if lowered.lo is not None:
                    first = max(first, int(lowered.lo[b, h, i]))
                if lowered.hi is not None:
                    last = min(last, int(lowered.hi[b, h, i]))
                if first < last:
                    seen[b, h, i, first:last] = True if grid is None else grid[i, first:last]
    return seen


def _decode_plane(lowered, b: int, h: int) -> torch.Tensor:
    offsets = lowered.block_offsets
    row = offsets[b if offsets.shape[0] > 1 else 0, h if offsets.shape[1] > 1 else 0].tolist()
    grid = torch.zeros(lowered.Sq, lowered.Sk, dtype=torch.bool)
    for q in range(len(row) - 1):
        for k, tile in lowered.block_list[row[q] : row[q + 1]].tolist():
            if tile == -1:
                grid[64 * q : 64 * q + 64, 64 * k : 64 * k + 64] = True
                continue
            words = lowered.bit_tiles[tile].tolist()
            for r in range(min(64, lowered.Sq - 64 * q)):
                bits = [words[r] >> c & 1 for c in range(min(64, lowered.Sk - 64 * k))]
                grid[64 * q + r, 64 * k : 64 * k + 64] = torch.tensor(bits, dtype=torch.bool)
    return grid


def assert_well_formed(lowered) -> None:
    """Shapes, dtypes, order and canonical form of a lowered mask."""
    B, H, Sq, Sk = lowered.B, lowered.Hq, lowered.Sq, lowered.Sk
    for bound in (lowered.lo, lowered.hi):
        if bound is not None:
            assert bound.shape == (B, H, Sq)
            assert bound.dtype == torch.int32
            assert bound.numel() == 0 or (int(bound.min()) >= 0 and int(bound.max()) <= Sk)
    parts = (lowered.block_offsets, lowered.block_list, lowered.bit_tiles)
    if not lowered.has_bits:
        assert parts == (None, None, None)
        return
    offsets, blocks, tiles = parts
    n_q, n_k = -(-Sq // 64), -(-Sk // 64)
    assert offsets.dtype == blocks.dtype == torch.int32
    assert tiles.dtype == torch.int64
    assert offsets.shape[0] in (1, B)
    assert offsets.shape[1] in (1, H)
    assert offsets.shape[2] == n_q + 1
    assert blocks.shape[1] == 2
    assert tiles.shape[1] == 64
    assert all(part.is_contiguous() for part in parts)
    flat = offsets.reshape(-1, n_q + 1)
    assert int(flat[0, 0]) == 0
    assert int(flat[-1, -1]) == len(blocks)
    assert torch.equal(flat[1:, 0], flat[:-1, -1])
    assert bool((flat.diff(dim=1) >= 0).all())
    k, tile = blocks.long().unbind(1)
    row = torch.repeat_interleave(flat.diff(dim=1).flatten().long())
    assert bool(((row * (n_k + 1) + k).diff() > 0).all()), "entries ascend by K granule within a Q granule"
    if len(blocks):
        assert int(k.min()) >= 0
        assert int(k.max()) < n_k
        assert int(tile.min()) >= -1
    used = tile[tile >= 0]
    assert torch.equal(torch.unique(used), torch.arange(len(tiles))), "every tile is used"
    assert len(torch.unique(tiles, dim=0)) == len(tiles), "equal tiles are stored once"
    assert bool((tiles != 0).any(1).all()), "no tile is empty"
    # No tile is full, and none has bits beyond the last row and key.
    rows = torch.where(row % n_q == n_q - 1, Sq - 64 * (n_q - 1), 64)[tile >= 0]
    keys = torch.where(k == n_k - 1, Sk - 64 * (n_k - 1), 64)[tile >= 0]
    bits = (tiles[used].unsqueeze(2) >> torch.arange(64)) & 1
    inside = (torch.arange(64) < rows.view(-1, 1)).unsqueeze(2) & (
        torch.arange(64) < keys.view(-1, 1)
    ).unsqueeze(1)
    assert not bool((bits.bool() & ~inside).any())
    assert bool((bits.sum((1, 2)) < rows * keys).all())


def assert_lowers(mask, B, H, Sq, Sk, Hkv=1):
    """The lowering of a mask shows what its formula does, bit for bit; returns it."""
    lowered = lower(mask, B, H, Hkv, Sq, Sk, "cpu")
    assert_well_formed(lowered)
    expected = mask.to_dense(Sq, Sk, B, H)
    assert expected.shape == (B, H, Sq, Sk)
    assert expected.dtype == torch.bool
    different = lowered.to_dense() != expected
    assert not bool(different.any()), (
        f"{mask!r} at {(B, H, Sq, Sk)}: first at {different.nonzero()[0].tolist()}"
    )
    return lowered
