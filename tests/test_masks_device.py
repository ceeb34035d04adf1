"""Lowering on an accelerator: which masks make the host wait for it. On torch's meta device, taken here for one,
nothing has a value, so whatever reads one raises."""

import pytest
import torch

from fastattn import explain, masks
from fastattn.masks import lower, native, waits
from fastattn.masks.lower import Lowered

B, H, S = 2, 4, 130
META = torch.device("meta")


@pytest.fixture(autouse=True)
def accelerator(monkeypatch):
    """The meta device is read like any other."""
    monkeypatch.setattr(waits, "valueless", lambda device: False)


def ints(*shape):
    return torch.empty(*shape, dtype=torch.int32, device=META)


def bools(*shape):
    return torch.empty(*shape, dtype=torch.bool, device=META)


@pytest.fixture
def scanned(monkeypatch):
    """A scan that answers for values: every granule seen in part."""
    n = -(-S // 64)

    def scan(tensor):
        planes = tensor.shape[0] * tensor.shape[1]
        count = planes * n * n
        lists = (
            torch.empty(count, 2, dtype=torch.int32, device=META),
            torch.empty(count, 64, dtype=torch.int64, device=META),
        )
        return ints(*tensor.shape[:2], n + 1), *lists, torch.tensor(native.NONZERO)

    monkeypatch.setattr(native, "scanner", lambda device: scan)


def lowered(mask) -> Lowered:
    """With the lists of the backward."""
    result = lower(mask, B, H, H, S, S, META)
    if result.has_bits:
        result.transpose()
    return result


NEVER = {
    "causal": masks.Causal,
    "causal, lower right": masks.CausalLowerRight,
    "window": lambda: masks.SlidingWindow(9, 3),
    "windows joined": lambda: masks.SlidingWindow(9, 0) | masks.SlidingWindow(0, 9),
    "lengths": lambda: masks.KeyPadding(ints(B)),
    "lengths and causal": lambda: masks.KeyPadding(ints(B)) & masks.Causal(),
    "prefix": lambda: masks.PrefixLM(ints(B)),
    "documents": lambda: masks.Documents(ints(5)),
    "chunks": lambda: masks.Chunked(16),
    "tensor of rows": lambda: bools(B, 1, S, 1),
}


@pytest.mark.parametrize("name", NEVER)
def test_the_host_does_not_wait_for(name):
    result = lowered(NEVER[name]())
    assert result.has_ranges and not result.has_bits and result.waits == ()


# One scan: its lists have the sizes that the values give.
SCANNED = {
    "tensor": lambda: bools(S, S),
    "tensor of heads": lambda: bools(B, H, S, S),
    "float tensor": lambda: torch.empty(B, 1, S, S, device=META),
    "dense and causal": lambda: masks.Dense(bools(S, S)) & masks.Causal(),
}


@pytest.mark.parametrize("name", SCANNED)
def test_the_host_waits_for_the_scan_alone_of(name, scanned):
    result = lowered(SCANNED[name]())
    assert result.has_bits and result.waits == ("how many granules a tensor has of each kind",)


# What reads a value, and the words for it.
READ = {
    "keys": (lambda: bools(B, 1, 1, S), "gaps"),
    "float keys": (lambda: torch.empty(B, 1, 1, S, device=META), "gaps"),
    "float rows": (lambda: torch.empty(B, 1, S, 1, device=META), "more than 0 and -inf"),
    "lengths or window": (lambda: masks.KeyPadding(ints(B)) | masks.SlidingWindow(3, 3), "one range"),
    "strided": (lambda: masks.Strided(8), "torch operations"),
}


@pytest.mark.parametrize("name", READ)
def test_the_host_reads_values_of(name, monkeypatch):
    make, words = READ[name]
    noted = []
    monkeypatch.setattr("fastattn.masks.waits.note", lambda device, reason: noted.append(reason))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta|Meta"):
        lowered(make())
    assert len(noted) == 1 and words in noted[0]


def test_explain_tells(scanned):
    q = torch.empty(B, H, S, 16, device=META)
    assert "the host waits for the device at each call, to learn how many granules" in str(
        explain(q, q, q, mask=bools(S, S))
    )
    assert "waits" not in str(explain(q, q, q, mask=masks.prepare(bools(S, S), q, q)))
    assert "waits" not in str(explain(q, q, q, mask=masks.Causal()))
