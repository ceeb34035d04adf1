"""Masks as values: equality, repr, pictures, preparation and error messages."""

import sys

import pytest
import torch
from mask_checks import bools

from fastattn.masks import (
    BigBird,
    BlockSparse,
    Causal,
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
    prepare,
)

pytestmark = pytest.mark.usefixtures("one_thread")


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
