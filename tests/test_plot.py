"""Heat maps: the numbers drawn, and the files."""

import subprocess
import sys

import pytest
import torch

import fastattn
from fastattn import masks, plot
from fastattn import nn as fnn
from fastattn.weights import AttentionWeights

pytest.importorskip("matplotlib")


def drawn(axis):
    return torch.tensor(axis.images[0].get_array().data)


def test_attention_heads(tmp_path):
    q, k = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8)
    mask = masks.Causal() & masks.KeyPadding([9, 5])
    path = tmp_path / "weights.png"
    labels = list("abcdefghi")
    axes = plot.attention(
        AttentionWeights(q, k, mask=mask), labels, heads=[3, 0], batch=1, path=path, title="two heads"
    )
    expected = fastattn.attention(q, k, k, mask=mask, return_weights=True)[1]
    assert len(axes) == 2 and [axis.get_title() for axis in axes] == ["head 3", "head 0"]
    for axis, h in zip(axes, (3, 0)):
        torch.testing.assert_close(drawn(axis), expected[1, h], atol=1e-6, rtol=1e-5)
        assert [t.get_text() for t in axis.get_xticklabels()] == labels
    assert path.read_bytes().startswith(b"\x89PNG")
    for tensor in (expected[1, 3], expected[1, 3:], expected[1:, 3:]):
        torch.testing.assert_close(drawn(plot.attention(tensor)[0]), expected[1, 3], atol=1e-6, rtol=1e-5)


def test_long_sequences_are_averaged_a_slab_at_a_time(monkeypatch):
    q = torch.randn(1, 2, 1500, 8)
    weights = AttentionWeights(q, q, mask=masks.SlidingWindow(200, 0))
    rows = AttentionWeights.rows
    tallest = []

    def spy(self, start, stop, *rest):
        tallest.append(stop - start)
        return rows(self, start, stop, *rest)

    monkeypatch.setattr(AttentionWeights, "rows", spy)
    (axis,) = plot.attention(weights, heads=[1])
    assert len(tallest) > 5 and max(tallest) * 1500 <= 1 << 17
    grid = drawn(axis)
    assert grid.shape == (512, 512)
    torch.testing.assert_close(grid.sum() / 512 * 1500 / 512, torch.tensor(1.0), atol=2e-2, rtol=2e-2)
    assert not grid.triu(2).any() and not grid.tril(-72).any()


def test_masks_and_encodings(tmp_path):
    (axis,) = plot.mask(masks.Causal(), Sq=5, Sk=7, path=tmp_path / "mask.png")
    assert torch.equal(drawn(axis), masks.Causal().to_dense(5, 7)[0, 0].float())
    assert axis.figure.get_suptitle() == "Causal()"
    sinusoids = fnn.SinusoidalPositionalEncoding(6)
    (axis,) = plot.encoding(sinusoids, 10)
    torch.testing.assert_close(drawn(axis), sinusoids.encoding(torch.arange(10)))
    assert len(plot.encoding(fnn.ALiBi(3), 6)) == len(plot.encoding(fnn.T5RelativeBias(3), 6)) == 3
    assert drawn(plot.encoding(fnn.RotaryEmbedding(8), 5)[0]).shape == (5, 4)
    assert drawn(plot.encoding(torch.randn(700, 3), path=tmp_path / "table.png")[0]).shape == (512, 3)
    with pytest.raises(TypeError, match="positional module"):
        plot.encoding(torch.nn.Linear(2, 2))


def test_bad_input():
    weights = torch.rand(2, 3, 4)
    for keywords, message in (
        (dict(heads=[2]), "heads must be some of 0..1"),
        (dict(heads=[]), "heads must be"),
        (dict(batch=1), "batch must be"),
        (dict(tokens=["a"]), "tokens must be 3 labels"),
        (dict(key_tokens=["a"]), "key_tokens must be 4 labels"),
    ):
        with pytest.raises(ValueError, match=message):
            plot.attention(weights, **keywords)
    with pytest.raises(ValueError, match="weights must be"):
        plot.attention(torch.rand(3))
    with pytest.raises(ValueError, match="nothing to draw"):
        plot.attention(torch.rand(0, 3))
    with pytest.raises(ValueError, match="elements to draw"):
        plot.encoding(torch.rand(0, 3))
    with pytest.raises(TypeError, match="mask of fastattn.masks.*got Tensor"):
        plot.mask(torch.ones(3, 3).bool())


def test_without_matplotlib_the_message_says_what_to_install():
    code = (
        "import sys; sys.modules['matplotlib'] = None; sys.modules['matplotlib.figure'] = None\n"
        "import torch, fastattn\n"
        "try: fastattn.plot.attention(torch.rand(3, 3))\n"
        "except ImportError as e: assert 'fastattn[plot]' in str(e)\n"
        "else: raise SystemExit('drawn')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
