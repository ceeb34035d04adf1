"""Benches of attention, forward, decode and training (with the training rows of softmax and the norms)."""

import pytest


@pytest.mark.suite("cpu-forward", "cpu-decode", "cpu-training")
def test_attention(row, side, run_row):
    run_row(row, side)
