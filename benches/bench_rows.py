"""Benches of softmax and the norms, forward."""

import pytest


@pytest.mark.suite("cpu-rows")
def test_rows(row, side, run_row):
    run_row(row, side)
