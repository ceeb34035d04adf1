"""Options and one test body for the benches: rows of `fastattn.tools.workloads` under pytest-benchmark."""

import pytest
import torch

from fastattn.tools import cases, workloads


def pytest_addoption(parser):
    group = parser.getgroup("fastattn")
    group.addoption("--full", action="store_true", help="every row of the suites, not only the quick ones")
    group.addoption("--bench-threads", type=int, default=1, help="threads of torch and fastattn (default 1)")


def pytest_collect_file(file_path, parent):
    if file_path.suffix == ".py" and file_path.name.startswith("bench_"):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_generate_tests(metafunc):
    """A test with the marker `suite(names...)` runs once a row and side."""
    marker = metafunc.definition.get_closest_marker("suite")
    if marker is None:
        return
    quick = not metafunc.config.getoption("--full")
    rows = [row for name in marker.args for row in workloads.select(name, quick=quick)]
    sides = [(row, side) for row in rows for side in ("ours", "torch")]
    metafunc.parametrize("row, side", sides, ids=[f"{row.suite}-{row.name}-{side}" for row, side in sides])


def pytest_configure(config):
    config.addinivalue_line("markers", "suite(name, ...): bench the rows of these suites")


@pytest.fixture
def run_row(benchmark, request):
    """Call with a row and a side to time it; rows that this version or this side cannot run are skipped."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.config.getoption("--bench-threads"))

    def run(row, side):
        try:
            case = cases.build(row)
        except cases.NotAvailable as reason:
            pytest.skip(str(reason))
        if side not in case.variants:
            pytest.skip(f"{side} has no such operation")
        benchmark.group = f"{row.suite} {row.name}"
        with torch.set_grad_enabled(row.training):
            benchmark(case.variants[side])
        if benchmark.stats is not None:
            rate = row.work / benchmark.stats.stats.median
            benchmark.extra_info.update({"work": row.work, "unit": row.unit, "rate": rate})

    yield run
    torch.set_num_threads(before)
