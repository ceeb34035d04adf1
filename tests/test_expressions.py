"""The mask expressions that commands read."""

import pytest
import torch

from fastattn.tools import mask


def test_expressions_are_read_as_python_would():
    from fastattn.masks import Causal, Documents, KeyPadding, SlidingWindow

    for text, expected in {
        "Causal()": Causal(),
        "Causal() & SlidingWindow(8, 0)": Causal() & SlidingWindow(8, 0),
        "~(Causal() | SlidingWindow(left=None, right=3))": ~(Causal() | SlidingWindow(left=None, right=3)),
        "KeyPadding([10, 20], side='left')": KeyPadding([10, 20], side="left"),
        "Documents([0, 4, 32]) & Causal()": Documents([0, 4, 32]) & Causal(),
    }.items():
        assert torch.equal(mask.parse(text).to_dense(32, 32, 2), expected.to_dense(32, 32, 2)), text


def test_tables_in_expressions_are_lists_of_truth_values():
    dense = mask.parse("Dense([[1, 0, 1], [0, 0, 1]])").to_dense(2, 3)
    assert dense[0, 0].tolist() == [[True, False, True], [False, False, True]]
    blocks = mask.parse("BlockSparse([[1, 0], [1, 1]], block=4)").to_dense(8, 8)
    assert int(blocks.sum()) == 48


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not well formed"),
        ("Causal(", "not well formed"),
        ("Causal", r"write Causal\(\.\.\.\)"),
        ("Casual()", "there is no mask 'Casual'; the masks are Band, BigBird"),
        ("Causal() + Causal()", "is not a mask"),
        ("Causal() and Causal()", "is not a mask"),
        ("__import__('os').system('true')", "is not a mask"),
        ("Causal().__class__", "is not a mask"),
        ("SlidingWindow(open('x'), 0)", "is not a value here"),
        ("SlidingWindow(1 + 1, 0)", "is not a value here"),
        ("SlidingWindow(*[1, 2])", r"\* and \*\* are not read here"),
        ("SlidingWindow(**{})", r"\* and \*\* are not read here"),
        ("Predicate(lambda b, h, i, j: i == j)", "Predicate cannot be written here"),
        ("(lambda: Causal())()", "is not a mask"),
        ("[Causal() for x in [1]][0]", "is not a mask"),
        ("Dense([[1], [1, 0]])", "nested lists of 0 and 1"),
        ("~" * 9000 + "Causal()", "nested too deeply"),
        ("Causal() & " * 1000 + "Causal()", "characters, at most"),
    ],
)
def test_expressions_are_refused_with_the_reason(text, why):
    with pytest.raises(mask.ExpressionError, match=why):
        mask.parse(text)


@pytest.mark.parametrize("text", ["SlidingWindow(-1, 0)", "SlidingWindow(1.5, 0)", "Causal(3)"])
def test_what_a_mask_refuses_is_its_own_error(text):
    with pytest.raises((ValueError, TypeError)):
        mask.parse(text)
