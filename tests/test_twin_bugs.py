"""The bugs that tests/twin/plant_bugs.py plants in the CUDA kernels: they fit the code, and each is noticed."""

import re
import subprocess
import sys

import pytest
from twin import build, plant_bugs
from twin.bugs import changed

KERNELS = build.ROOT / "csrc" / "cuda"


@pytest.mark.parametrize("name", plant_bugs.FAMILIES)
def test_bugs_fit_the_code(name):
    """A bug whose text has changed is to change with it."""
    for bug in plant_bugs.FAMILIES[name].BUGS:
        text = (KERNELS / bug.file).read_text()
        assert changed(bug, text) != text, bug.name


def test_the_report_is_of_these_bugs():
    """`plant_bugs.py FAMILY --write` renews a family's part of it; what was not planted is counted, not named."""
    sections = re.split(r"^## (\w+)\n", plant_bugs.REPORT.read_text(), flags=re.M)[1:]
    for name, text in zip(sections[::2], sections[1::2], strict=True):
        rows = [line.split(" | ")[0] for line in text.splitlines()[5:] if line.startswith("| ")]
        names = [f"| {bug.name}" for bug in plant_bugs.FAMILIES[name].BUGS]
        assert rows == [name for name in names if name in rows], name
        left = len(names) - len(rows)
        assert (f" {left} more are in the list" in text) == (left > 0), name


@pytest.mark.slow
@pytest.mark.skipif(build.missing is not None, reason=str(build.missing))
@pytest.mark.parametrize("name", plant_bugs.FAMILIES)
def test_bugs_are_noticed(name):
    command = [sys.executable, str(build.TWIN / "plant_bugs.py"), name]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
