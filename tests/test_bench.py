"""`python -m fastattn bench`: measuring, floors, ceilings, rivals, reports and plots."""

import dataclasses
import json

import pytest
import torch

from fastattn.tools import cases, ceilings, report, rivals, runner, workloads
from fastattn.tools.families import AttentionShape, family_of


class Clock:
    """Time that only the fake variants advance."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def variant(self, name, *durations):
        """Takes the durations in turn, the last one ever after."""
        left = list(durations)

        def call():
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def test_measure_takes_variants_in_turn_and_turns_the_order():
    clock = Clock()
    variants = {"a": clock.variant("a", 1.0), "b": clock.variant("b", 2.0)}
    timings = runner.measure(variants, budget=8.0, rounds=(4, 10), clock=clock)
    assert "".join(clock.calls) == "aabb" + "abba" * 2
    assert timings["a"].samples == (1.0,) * 4
    assert timings["b"].rounds == (0, 1, 2, 3)
    assert runner.ratio(timings["b"], timings["a"]) == (2.0, (2.0, 2.0))


def test_measure_goes_on_for_what_is_undecided():
    clock = Clock()
    variants = {name: clock.variant(name, 1.0) for name in "abc"}
    asked = []

    def undecided(timings):
        asked.append({name: len(t.samples) for name, t in timings.items()})
        return {"a", "b"} if asked[-1]["a"] < 6 else set()

    timings = runner.measure(
        variants, budget=6.0, rounds=(2, 100), clock=clock, undecided=undecided, patience=9.0
    )
    assert [len(timings[name].samples) for name in "abc"] == [6, 6, 2] and len(asked) == 5
    timings = runner.measure(
        variants, budget=6.0, rounds=(2, 100), clock=clock, undecided=lambda t: {"a"}, patience=2.0
    )
    assert len(timings["a"].samples) == 8, "six seconds of three variants, six more of one"


@pytest.mark.parametrize("middle, spread, near", [(0.97, 0.1, True), (1.05, 0.4, True), (1.05, 0.1, False)])
def test_a_ratio_near_its_floor_is_undecided(middle, spread, near):
    limit = workloads.Limit("torch", 1 / 1.02)
    ours = [1.0] * 16
    theirs = [middle + spread * (n - 7.5) / 15 for n in range(16)]
    timings = {
        name: runner.Timing(tuple(samples), 1.0, tuple(range(16)))
        for name, samples in (("ours", ours), ("torch", theirs))
    }
    assert runner._near([limit], timings) == ({"ours", "torch"} if near else set())
    assert runner._near([workloads.Limit("eager", 1.0)], timings) == set()


def test_measure_separates_the_first_call_and_repeats_short_ones():
    clock = Clock()
    timings = runner.measure({"a": clock.variant("a", 3.0, 1e-5)}, budget=0.0, rounds=(2, 2), clock=clock)
    assert timings["a"].first == 3.0
    assert len(clock.calls) == 2 + 2 * 20
    assert timings["a"].median == pytest.approx(1e-5)


def test_measure_stops_at_the_budget_and_lets_slow_variants_sit_out():
    clock = Clock()
    variants = {"fast": clock.variant("fast", 0.01), "slow": clock.variant("slow", 1.0)}
    timings = runner.measure(variants, budget=2.5, rounds=(5, 1000), clock=clock)
    assert len(timings["slow"].samples) == 3
    assert len(timings["fast"].samples) >= 5
    assert runner.ratio(timings["slow"], timings["fast"])[0] == pytest.approx(100)
    clock = Clock()
    timings = runner.measure({"a": clock.variant("a", 0.1)}, budget=1.0, rounds=(5, 1000), clock=clock)
    assert len(timings["a"].samples) == 10


def test_a_ratio_is_taken_within_rounds():
    slow_machine = runner.Timing((1.0, 10.0, 1.0), 0.0, (0, 1, 2))
    half = runner.Timing((0.5, 5.0, 0.5), 0.0, (0, 1, 2))
    assert runner.ratio(slow_machine, half)[0] == 2.0
    sat_out = runner.Timing((5.0,), 0.0, (1,))
    assert runner.ratio(slow_machine, sat_out)[0] == 2.0


def test_quartiles_interpolate():
    assert runner.quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (2.0, 4.0)
    assert runner.quartiles([1.0, 2.0]) == (1.25, 1.75)
    assert runner.quartiles([7.0]) == (7.0, 7.0)


ROW = workloads.Workload(
    "cpu-forward",
    "attention",
    "bf16",
    AttentionShape(1, 2, 64, 16),
    limits=(workloads.Limit("torch", 2.0), workloads.Limit("absent", 1.0)),
)
AREA = dataclasses.replace(ROW, suite="masks", mask="window16", features=("area",), limits=())


def test_floors_follow_the_instruction_set():
    rows = [ROW]
    assert workloads.held_to(rows, "avx512_bf16") == rows
    assert [(x.against, x.floor) for x in workloads.held_to(rows, "avx2")[0].limits] == [
        ("torch", 1.0),
        ("absent", 1.0),
    ]
    assert [x.against for x in workloads.held_to(rows, "scalar")[0].limits] == ["absent"]


def fake_build(clock_factors):
    """A build whose variants take fixed times on the wall clock of measure."""

    def build(row, device="cpu"):
        if row.dtype == "fp16":
            raise cases.NotAvailable("no fp16 today")
        if row.dtype == "fp64":
            raise RuntimeError("broken\nsecond line")
        return cases.Case(row, dict(clock_factors), {}, row.limits, 0.25, "cpu")

    return build


@pytest.fixture
def fake_bench(monkeypatch):
    """run(rows) -> the bench of rows whose variants take 1 ms (ours), 3 ms (torch) and 4 ms (unmasked)."""
    clock = Clock()
    variants = {
        "ours": clock.variant("ours", 1e-3),
        "torch": clock.variant("torch", 3e-3),
        "unmasked": clock.variant("unmasked", 4e-3),
    }
    real = runner.measure
    monkeypatch.setattr(runner, "build", fake_build(variants))
    monkeypatch.setattr(runner, "measure", lambda v, **options: real(v, **{**options, "clock": clock}))
    monkeypatch.setattr(
        runner, "Ceilings", lambda device: ceilings.Ceilings(device, lambda kind, seconds, size: 1e12)
    )

    def run(rows, **options):
        return runner.run_suite(rows, runner.Options(threads=(1,), budget=0.01, rivals=False, **options))

    return run


def test_a_bench_row_has_times_ratios_share_and_verdicts(fake_bench):
    before = torch.get_num_threads()
    bench = fake_bench([ROW, dataclasses.replace(ROW, dtype="fp16"), dataclasses.replace(ROW, dtype="fp64")])
    assert torch.get_num_threads() == before
    row, missing, failed = bench["rows"]
    assert row["times"]["ours"]["median"] == pytest.approx(1e-3)
    assert row["ratios"]["torch"]["median"] == pytest.approx(3.0)
    assert row["rate"] == pytest.approx(ROW.work / 1e-3)
    assert row["share"] == pytest.approx(ROW.work / 1e-3 / 1e12)
    assert [limit["met"] for limit in row["limits"]] == [True, None]
    assert not row["noisy"]
    assert row["kernel"] == "cpu"
    assert missing["missing"] == "no fp16 today"
    assert failed["failed"] == "RuntimeError: broken"
    assert bench["schema"] == runner.SCHEMA
    assert bench["machine"]["torch"] == torch.__version__
    json.dumps(bench)


def test_a_missed_floor_is_told(fake_bench):
    strict = dataclasses.replace(ROW, limits=(workloads.Limit("torch", 3.5),))
    bench = fake_bench([strict])
    assert bench["rows"][0]["limits"][0]["met"] is False
    bench["rows"][0]["setup"] = {"slow": 3.0, "quick": 0.1}
    assert report.setup_times(bench) == {"slow": "3 s"}
    assert report.missed(bench) == [f"cpu-forward {strict.name} (1 thread): 3.00 over torch, floor 3.50"]


def test_a_floor_can_be_a_share_of_the_ceiling(fake_bench):
    shares = (0.5 * ROW.work / 1e9, 2 * ROW.work / 1e9)  # ours takes 1 ms, the ceiling is 1e12
    limits = tuple(workloads.Limit(workloads.CEILING, share) for share in shares)
    row = fake_bench([dataclasses.replace(ROW, limits=limits)])["rows"][0]
    assert [limit["met"] for limit in row["limits"]] == [True, False]
    assert row["limits"][0]["ratio"] == row["share"]
    gpu = [row for suite in ("gpu-decode", "gpu-rows") for row in workloads.select(suite) if row.limits]
    assert {(row.suite, row.limits[0].floor) for row in gpu} == {("gpu-decode", 0.8), ("gpu-rows", 0.9)}


def test_benches_are_saved_loaded_and_refused(fake_bench, tmp_path):
    bench = fake_bench([ROW])
    runner.save(bench, tmp_path / "a.json")
    assert runner.load(tmp_path / "a.json") == json.loads(json.dumps(bench))
    (tmp_path / "b.json").write_text("not json")
    with pytest.raises(ValueError, match=r"b\.json is not a bench result"):
        runner.load(tmp_path / "b.json")
    (tmp_path / "c.json").write_text('{"schema": 99, "rows": []}')
    with pytest.raises(ValueError, match="schema 99, this version reads schema 1"):
        runner.load(tmp_path / "c.json")
    (tmp_path / "d.json").write_text("[]")
    with pytest.raises(ValueError, match="no schema and rows"):
        runner.load(tmp_path / "d.json")


def test_compare_reads_ratios_and_knows_noise(fake_bench):
    old = json.loads(json.dumps(fake_bench([ROW])))
    new = json.loads(json.dumps(old))
    assert [change["verdict"] for change in runner.compare(old, new)] == ["same"]
    # Twice as slow a machine changes times, not ratios.
    for time in new["rows"][0]["times"].values():
        time["median"] *= 2
    assert [change["verdict"] for change in runner.compare(old, new)] == ["same"]
    new["rows"][0]["ratios"]["torch"] = {"median": 4.0, "quartiles": [3.9, 4.1]}
    (change,) = runner.compare(old, new)
    assert change["verdict"] == "faster"
    assert change["change"] == pytest.approx(4 / 3)
    assert [c["verdict"] for c in runner.compare(new, old)] == ["slower"]
    new["rows"][0]["ratios"]["torch"]["quartiles"] = [2.0, 6.0]
    assert [c["verdict"] for c in runner.compare(old, new)] == ["same"]
    new["rows"][0]["threads"] = 2
    assert runner.compare(old, new) == []


def test_ceilings_take_the_best_kind_and_share_measurements(monkeypatch):
    asked = []

    def measure(kind, seconds, size):
        asked.append((kind, size))
        return {"tile_bf16": 0.0, "dot_bf16": 2e11, "fma_f32": 1e11}.get(kind, 1e10 + len(asked))

    peaks = ceilings.Ceilings("cpu", measure)
    assert peaks.rate("bf16") == 2e11
    assert peaks.rate("fp32") == 1e11
    assert asked == [("tile_bf16", 0), ("dot_bf16", 0), ("fma_f32", 0)]
    first = peaks.rate("read", 1_000_000)
    assert peaks.rate("read", 600_000) == first
    assert asked[3:] == [("read", 1 << 20)]
    peaks.rate("copy", 1 << 40)
    assert asked[4:] == [("copy", ceilings.LARGEST_SET), ("copy_stream", ceilings.LARGEST_SET)]
    monkeypatch.setattr(ceilings, "SECONDS_BETWEEN", 0.0)
    assert peaks.rate("read", 1_000_000) > first
    assert {entry["kind"] for entry in peaks.measured()} == {
        "dot_bf16",
        "fma_f32",
        "read",
        "copy",
        "copy_stream",
    }


@pytest.mark.parametrize(("tiles", "forward"), [(2.8e12, 8e11), (0.0, 1e11), (2e11, 1e11)])
def test_fp16_is_bounded_by_the_products_that_its_split_takes(tiles, forward):
    """3.5 tile products for one of fp16 forward, 24 for 7 with backward; without tiles, or with slow ones, vectors."""
    peaks = ceilings.Ceilings("cpu", lambda kind, *_: {"tile_bf16": tiles, "fma_f32": 1e11}[kind])
    row = workloads.Workload("x", "attention", "fp16", AttentionShape(1, 2, 128, 64))
    assert peaks.rate(row.ceiling) == pytest.approx(forward)
    trained = dataclasses.replace(row, training=True)
    assert peaks.rate(trained.ceiling) == pytest.approx(max(tiles * 7 / 24, 1e11))


def test_no_ceilings_without_a_way_to_measure():
    peaks = ceilings.Ceilings("cuda")
    assert peaks.rate("bf16") is None
    assert peaks.measured() == []


@pytest.mark.parametrize("kind", ["fma_f32", "read", "copy", "copy_stream"])
def test_the_machine_has_ceilings(kind):
    assert torch.ops.fastattn.measure_ceiling(kind, 0.01, 1 << 16) > 1e7


def test_ceilings_refuse_bad_arguments():
    with pytest.raises(RuntimeError, match="kind must be one of fma_f32.*got 'fast'"):
        torch.ops.fastattn.measure_ceiling("fast", 0.01, 0)
    with pytest.raises(RuntimeError, match="seconds must be in"):
        torch.ops.fastattn.measure_ceiling("read", 0.0, 0)
    with pytest.raises(RuntimeError, match="bytes must not be negative"):
        torch.ops.fastattn.measure_ceiling("read", 0.01, -1)


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 300 * 1024, 1024 * 1024 + 5])
def test_read_once_reads_whole_blocks(size):
    data = torch.zeros(size + 1, dtype=torch.uint8)
    assert torch.ops.fastattn.read_once(data[:size]) == size // 1024 * 1024
    assert torch.ops.fastattn.read_once(data[1:]) == size // 1024 * 1024


def test_rivals_answer_or_say_why_not():
    def fine(case):
        return lambda: 1

    def absent(case):
        raise rivals.Absent("not here")

    def broken(case):
        return lambda: 1 / 0

    case = cases.Case(ROW, {}, {})
    found, reasons, setup = rivals.variants(
        case, (rivals.Rival("a", fine), rivals.Rival("b", absent), rivals.Rival("c", broken))
    )
    assert list(found) == list(setup) == ["a"]
    assert reasons == {"b": "not here", "c": "it failed here: ZeroDivisionError: division by zero"}


@pytest.mark.parametrize("training", [False, True])
def test_a_row_operation_by_another_function(training):
    row = workloads.Workload("x", "layer_norm", "fp32", workloads.RowShape(7, 33), training=training)
    case = cases.build(row)
    theirs = cases.row_call(case, torch.nn.functional.layer_norm)
    torch.testing.assert_close(theirs(), case.variants["torch"](), atol=0, rtol=0)


def test_rivals_that_are_not_installed_are_named():
    with pytest.raises(rivals.Absent, match="no-such-package is not installed"):
        rivals._module("no_such_package", "no-such-package")


def test_every_rival_has_a_reason_or_an_answer_of_the_right_values():
    row = workloads.Workload(
        "x", "attention", "fp32", AttentionShape(1, 4, 64, 16, hkv=2), "window16", "object"
    )
    case = cases.build(row)
    eager = [rival for rival in rivals.RIVALS if rival.name not in ("flex_attention", "torch.compile")]
    found, reasons, _ = rivals.variants(case, tuple(eager))
    assert set(found) | set(reasons) == {rival.name for rival in eager}
    for call in found.values():
        torch.testing.assert_close(call(), case.variants["torch"](), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("value", "text"), [(2.5, "2.5 s"), (1.234e-3, "1.23 ms"), (5e-6, "5 us"), (7e-9, "7 ns"), (None, "-")]
)
def test_seconds(value, text):
    assert report.seconds(value) == text


def test_rates_and_counts():
    assert report.rate(2.34e11, "flops") == "234 GF/s"
    assert report.rate(2.34e12, "flops") == "2.34 TF/s"
    assert report.rate(2.34e10, "bytes") == "23.4 GB/s"
    assert [report.count_of(n, "thread") for n in (1, 2)] == ["1 thread", "2 threads"]


def test_tables_line_up_and_escape():
    text = report.plain_table("title", ("a", "long column"), [("first", "1"), ("b", "22")])
    assert text.splitlines() == [
        "title",
        "a      long column",
        "-----  -----------",
        "first            1",
        "b               22",
    ]
    assert report.markdown_table(("a", "b"), [("x|y", "1")]) == "| a | b |\n|---|--:|\n| x\\|y | 1 |\n"


def test_bench_cells_tell_everything(fake_bench):
    bench = fake_bench([ROW, AREA, dataclasses.replace(ROW, dtype="fp16")])
    cells = dict(zip(report.COLUMNS, report.bench_cells(bench["rows"][0]), strict=True))
    assert cells["x torch"] == "3.00"
    assert cells["floor"] == "2.00 ok; 1.00 over absent ? (got not measured)"
    assert report.bench_cells(bench["rows"][2])[2] == "not available"
    text = report.bench_markdown(bench)
    assert "### cpu-forward" in text
    assert "### masks" in text
    assert "| bf16-b1-h2-s64-d16 | 3.00 x (" in report.bench_summary(bench)


def test_missed_floors_stand_beside_what_the_ceiling_allows(fake_bench):
    bench = fake_bench([ROW, AREA])
    assert "### cpu-forward: 1 of 1 floors reached\n\n###" in report.bench_missed(bench)
    row = bench["rows"][0]
    row["limits"][0] |= {"floor": 3.5, "met": False}
    row["share"] = 0.75
    assert f"| {row['name']}, 1 thread | 3.00 | 3.50 | 75 % | 4.0 |" in report.bench_missed(bench)


def test_plots_are_pictures(fake_bench, tmp_path):
    pytest.importorskip("matplotlib")
    areas = [
        dataclasses.replace(AREA, mask=name, spelling="object") for name in ("window16", "window64", "causal")
    ]
    bench = fake_bench([ROW, *areas])
    written = report.plot(bench, tmp_path / "out.png")
    assert [path.name for path in written] == ["out-cpu-forward.png", "out-masks.png"]
    for path in written:
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(ValueError, match="nothing to draw"):
        report.plot({"rows": [], "machine": bench["machine"]}, tmp_path / "none.png")


def test_families_are_lines_of_a_plot():
    assert [family_of(name) for name in ("window256", "causal", "blocks5", "blocks50")] == [
        "window",
        "causal",
        "blocks",
        "blocks",
    ]
