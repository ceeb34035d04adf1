"""The launch table of Triton's attention, and tuning, which replaces it for who asks."""

import itertools

import pytest
import torch

import fastattn
from fastattn import _triton, reference
from fastattn.tools.equivalence import error_rule

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def device(triton_device):
    with torch.device(triton_device):
        yield triton_device


@pytest.fixture
def tune(device):
    module = _triton.module("tune")
    module.forget()
    yield module
    module.forget()


def test_the_table_of_launches():
    """Tiles of bits are granules or parts of one, for every architecture; all tiles are what a matrix unit takes."""
    launch = _triton.module("launch")
    for arch in launch.SHARED:
        for itemsize, width, rows, *flags in itertools.product(
            (2, 4), (16, 64, 96, 128, 192, 256), (1, 17, 64, 4096), *[(False, True)] * 3
        ):
            row = (arch, itemsize, width, rows, *flags)
            assert launch.attention(*row) == launch.attention_candidates(*row)[0]
            for tile in launch.attention_candidates(*row):
                assert tile.M >= 16 and tile.N >= 16 and 128 % tile.M == 128 % tile.N == 0, row
                assert not flags[0] or (tile.M <= 64 and tile.N <= 64), row


def test_tuning_is_asked_for_and_takes_the_fastest(device, tune, monkeypatch):
    """By a timer that has a favourite; one call of a kind is timed, a tile that does not fit is left out."""
    from triton.runtime.errors import OutOfResources

    timed = []

    def seconds(run, device):
        tile = run.args[0]
        timed.append(tile)
        run()
        if tile.num_stages > 3:
            raise OutOfResources(2, 1, "shared memory")
        return 1.0 if tile.N == 32 else 2.0

    monkeypatch.setattr(tune, "seconds", seconds)
    q, k, v = torch.randn(1, 2, 70, 64), torch.randn(1, 1, 150, 64), torch.randn(1, 1, 150, 64)

    def told():
        return fastattn.explain(q, k, v, backend="triton").detail

    def check(q, **given):
        right = reference.attention(*(t.double() for t in (q, k, v)), **given)
        out = fastattn.attention(q, k, v, backend="triton", **given)
        assert error_rule(out, right, None, magnitude=v.abs().max().item())

    check(q)
    assert not timed and "64 x 64 tiles, 4 warps" in told() and "timed" not in told()
    monkeypatch.setenv("FASTATTN_TUNE", "1")
    assert "64 x 64 tiles" in told() and "to be timed beside" in told() and not timed
    check(q)
    assert 4 < len(timed) == len(set(timed)) and timed[0].N == 64
    assert f"64 x 32 tiles, 4 warps, 3 stages, the fastest of {len(timed)} timed (FASTATTN_TUNE)" in told()
    count = len(timed)
    check(q)
    check(torch.cat([q, q], 2))
    assert len(timed) == count, "another length is the same kind"
    check(q, softcap=2.0)
    assert len(timed) > count
    monkeypatch.delenv("FASTATTN_TUNE")
    assert "64 x 64 tiles" in told()


def test_what_the_tables_tile_raises_is_raised(device, tune):
    from triton.runtime.errors import OutOfResources

    def run(tile):
        if tile == "table's":
            raise OutOfResources(2, 1, "shared memory")

    with pytest.raises(OutOfResources):
        tune.best("kind", ["table's", "other"], run, device)
    assert tune.chosen("kind") is None
    assert tune.best("kind", ["one", "table's"], run, device) == "one" == tune.chosen("kind")
