"""The scan of a mask on a device: the same lists as the CPU's, on a GPU or in Triton's interpreter."""

import pytest
import torch
from mask_checks import additive, bools

from fastattn import _triton

EVERYTHING, NONZERO = 1, 2


@pytest.fixture
def scan(triton_device):
    def run(mask):
        results = torch.ops.fastattn_triton.mask_scan(mask.to(triton_device))
        return [t.cpu() for t in results]

    return run


def assert_same(results, mask):
    """The lists are equal, tiles by content; the flags too."""
    offsets, blocks, tiles, flags = results
    other = torch.ops.fastattn.mask_scan(mask)
    assert torch.equal(offsets, other[0])
    assert torch.equal(blocks[:, 0], other[1][:, 0])
    contents = [torch.cat([t, t.new_full((1, 64), -1)]) for t in (tiles, other[2])]
    assert torch.equal(contents[0][blocks[:, 1].long()], contents[1][other[1][:, 1].long()])
    assert int((blocks[:, 1] >= 0).sum()) == len(tiles)
    assert int(flags) == int(other[3])


SHAPES = [(1, 1, 1, 1), (1, 1, 64, 64), (2, 3, 65, 63), (1, 2, 130, 200), (3, 1, 1, 257), (1, 1, 200, 1)]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lists(scan, shape, dtype):
    for share in (0.0, 0.02, 0.98, 1.0):
        mask = bools(*shape, share=share)
        if dtype != torch.bool:
            mask = additive(mask, dtype)
        assert_same(scan(mask), mask)


def test_strides_and_whole_granules(scan):
    wide = bools(2, 300, 400)
    wide[:, 64:192, 128:256] = True
    wide[:, 192:256] = False
    for mask in (
        wide[None, :, ::2, 1::3],
        wide.mT[None],
        wide[:1, :256, :256].expand(2, 3, 256, 256)[:1, :1],
    ):
        assert_same(scan(mask), mask)


@pytest.mark.parametrize("value", [1.5, -0.0, float("nan"), torch.finfo(torch.float32).min, float("inf")])
def test_finite_values(scan, value):
    mask = additive(bools(1, 1, 70, 130))
    mask[0, 0, 66, 129] = value
    results = scan(mask)
    assert_same(results, mask)
    assert bool(int(results[3]) & NONZERO) == (value != 0)


def test_everything(scan):
    assert int(scan(torch.ones(2, 1, 65, 70, dtype=torch.bool))[3]) == EVERYTHING
    assert int(scan(torch.ones(2, 1, 65, 70))[3]) == EVERYTHING | NONZERO


def test_too_many_granules_are_refused(triton_device):
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=triton_device).expand(2**16, 2**15, 64, 64)
    with pytest.raises(ValueError, match="too large for int32"):
        _triton.module("mask_scan").mask_scan(mask)
