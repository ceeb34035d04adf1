"""Benches of masks: attention by visible area and spelling, building and scanning masks."""

import pytest


@pytest.mark.suite("masks")
def test_masks(row, side, run_row):
    run_row(row, side)
