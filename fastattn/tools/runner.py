"""Times the rows of a suite: variants interleaved in one process, so that what disturbs one disturbs all.

A row's variants (ours, torch, rivals) run in turn, round after round, until the row's time budget is spent.
A ratio is the median over rounds of one variant's time over another's in the same round; medians and
quartiles of the times themselves go beside it. Machines are shared and clocks move: ratios from one run
mean something, times from two runs do not.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from . import rivals
from .cases import Case, NotAvailable, build
from .ceilings import Ceilings
from .machine import machine
from .workloads import CEILING, Limit, Workload

SCHEMA = 1

# One sample lasts at least this long, calls repeated inside it, so that the clock's own cost disappears.
SHORTEST_SAMPLE = 2e-4


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call of a variant: `samples`, the round of each, and the first call, which may
    compile."""

    samples: tuple[float, ...]
    first: float
    rounds: tuple[int, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        return quartiles(self.samples)


def quartiles(samples: Iterable[float]) -> tuple[float, float]:
    """First and third quartile, by linear interpolation between samples."""
    ordered = sorted(samples)

    def at(share):
        position = share * (len(ordered) - 1)
        low = math.floor(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    return at(0.25), at(0.75)


def ratio(slow: Timing, fast: Timing) -> tuple[float, tuple[float, float]]:
    """Median and quartiles of slow's time over fast's in the same round, over the rounds that both ran in."""
    others = dict(zip(fast.rounds, fast.samples, strict=True))
    shares = [
        time / others[index] for index, time in zip(slow.rounds, slow.samples, strict=True) if index in others
    ]
    return statistics.median(shares), quartiles(shares)


def measure(
    variants: Mapping[str, Callable[[], Any]],
    *,
    budget: float = 1.0,
    rounds: tuple[int, int] = (5, 400),
    clock: Callable[[], float] = time.perf_counter,
    synchronize: Callable[[], None] = lambda: None,
    elapsed_by: Callable[[Callable[[], Any], int], float] | None = None,
    undecided: Callable[[dict[str, Timing]], set[str]] = lambda timings: set(),
    patience: float = 1.0,
) -> dict[str, Timing]:
    """Time variants in turn and return a Timing for each.

    budget is in seconds for all variants together, warm-up not counted; rounds is (fewest, most). The order
    turns round every other round, so that no variant always runs behind the same one. Where rounds are
    long, three do: for all once three budgets are spent, for a single slow rival once it has spent one.
    elapsed_by(call, count) times that many calls by another clock than the host's, a GPU's. Then the variants that
    undecided(timings so far) names take further rounds, until it names none or `patience` budgets are spent.
    """

    def by_clock(call, count):
        start = clock()
        for _ in range(count):
            call()
        synchronize()
        return clock() - start

    elapsed_by = elapsed_by or by_clock
    repeats, first = {}, {}
    for name, call in variants.items():
        start = clock()
        call()
        synchronize()
        first[name] = clock() - start
        repeats[name] = max(1, math.ceil(SHORTEST_SAMPLE / max(elapsed_by(call, 1), 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in variants}
    taken: dict[str, list[int]] = {name: [] for name in variants}
    spent = dict.fromkeys(variants, 0.0)
    order = list(variants)

    def timings():
        return {name: Timing(tuple(samples[name]), first[name], tuple(taken[name])) for name in variants}

    collecting = gc.isenabled()
    gc.disable()
    try:
        begin = clock()
        for index in range(rounds[1]):
            elapsed = clock() - begin
            further = None
            if elapsed >= budget and (index >= rounds[0] or (index >= 3 and elapsed >= 3 * budget)):
                further = undecided(timings()) if elapsed < patience * budget else set()
                if not further:
                    break
            for name in order if index % 2 == 0 else reversed(order):
                if further is not None and name not in further:
                    continue
                if further is None and spent[name] > budget and len(taken[name]) >= 3:
                    continue
                count = repeats[name]
                elapsed = elapsed_by(variants[name], count)
                spent[name] += elapsed
                samples[name].append(elapsed / count)
                taken[name].append(index)
    finally:
        if collecting:
            gc.enable()
    return timings()


@dataclasses.dataclass(frozen=True)
class Options:
    """How a bench runs. threads: each count is a pass over the rows. budget: seconds a row. rivals: run
    them too."""

    threads: tuple[int, ...] = (1, 2)
    budget: float = 1.5
    device: str = "cpu"
    rivals: bool = True


def run_row(row: Workload, threads: int, ceilings: Ceilings, options: Options) -> dict[str, Any]:
    """Build, check for sanity, time and judge one row; the JSON object of one result."""
    result = {
        "suite": row.suite,
        "name": row.name,
        "op": row.op,
        "dtype": row.dtype,
        "shape": dataclasses.asdict(row.shape),
        "mask": row.mask,
        "spelling": row.spelling,
        "features": list(row.features),
        "training": row.training,
        "threads": threads,
    }
    try:
        case = build(row, options.device)
        return result | _time_case(case, ceilings, options)
    except NotAvailable as reason:
        return result | {"missing": str(reason)}
    except Exception as error:
        # One row that fails must not lose the others; a bench with such a row exits with 1.
        return result | {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


def _disturbed(timing: Timing) -> bool:
    """Whether something else kept the machine from this variant for much of the time."""
    low, high = timing.quartiles
    return high - low > 0.3 * timing.median or timing.median > 1.5 * min(timing.samples)


# A floor of 2 % below 1 takes more rounds to tell than a time budget has of a whole model's.
_PATIENCE = {"model": 12.0}


def _near(limits: Iterable[Limit], timings: Mapping[str, Timing]) -> set[str]:
    """The variants of limits whose ratio is as near to its floor as two standard errors of its median."""
    near = set()
    for limit in limits:
        if limit.against not in timings or limit.of not in timings:
            continue
        middle, (low, high) = ratio(timings[limit.against], timings[limit.of])
        rounds = len(timings[limit.of].samples)
        # Of numbers spread as a normal distribution's; of a few rounds the quartiles say little themselves.
        error = max(0.93 * (high - low), 0.1 if rounds < 8 else 0.0) / math.sqrt(rounds)
        if abs(middle - limit.floor) < 2 * error:
            near |= {limit.against, limit.of}
    return near


def _time_case(case: Case, ceilings: Ceilings, options: Options) -> dict[str, Any]:
    row, variants, absent, setup = case.row, dict(case.variants), {}, {}
    if options.rivals and row.rivals:
        found, absent, setup = rivals.variants(case)
        variants |= found
    with torch.set_grad_enabled(row.training):
        timings = measure(
            variants,
            budget=options.budget,
            synchronize=_synchronizer(options.device),
            elapsed_by=elapsed_on_gpu if options.device.startswith("cuda") else None,
            undecided=lambda timings: _near(case.limits, timings),
            patience=_PATIENCE.get(row.op, 1.0),
        )
    ours = timings["ours"]
    if row.ceiling:
        ceilings.rate(*_bound(row))
    return {
        "visible": case.visible,
        "kernel": case.kernel,
        "noisy": any(_disturbed(timings[name]) for name in ("ours", "torch") if name in timings),
        "unit": row.unit,
        "work": row.work,
        "rate": row.work / ours.median,
        "ceiling": row.ceiling,
        "times": {name: _times(timing, row.work) for name, timing in timings.items()},
        "setup": setup,
        "ratios": {name: _ratio(timing, ours) for name, timing in timings.items() if name != "ours"},
        "absent": absent,
        "limits": [_judge(limit, timings) for limit in case.limits],
        **case.facts,
    }


def _bound(row: Workload) -> tuple[str, float | None]:
    return str(row.ceiling), row.work if row.unit == "bytes" else None


def _add_share(result: dict[str, Any], row: Workload, ceilings: Ceilings) -> None:
    """Fill in the share once the pass is over: the ceiling is the best of all its measurements."""
    if "rate" in result:
        peak = ceilings.rate(*_bound(row)) if row.ceiling else None
        share = result["rate"] / peak if peak else None
        result |= {"ceiling_rate": peak, "share": share}
        for limit in result["limits"]:
            if limit["against"] == CEILING and share is not None:
                limit |= {"ratio": share, "met": share >= limit["floor"]}


def _times(timing: Timing, work: float) -> dict[str, Any]:
    low, high = timing.quartiles
    return {
        "median": timing.median,
        "quartiles": [low, high],
        "best": min(timing.samples),
        "first": timing.first,
        "rounds": len(timing.samples),
        "rate": work / timing.median,
    }


def _ratio(slow: Timing, fast: Timing) -> dict[str, Any]:
    middle, (low, high) = ratio(slow, fast)
    return {"median": middle, "quartiles": [low, high]}


def _judge(limit: Limit, timings: Mapping[str, Timing]) -> dict[str, Any]:
    judged = {"against": limit.against, "of": limit.of, "floor": limit.floor, "why": limit.why}
    if limit.against not in timings or limit.of not in timings:
        return judged | {"ratio": None, "met": None}
    reached = ratio(timings[limit.against], timings[limit.of])[0]
    return judged | {"ratio": reached, "met": reached >= limit.floor}


def elapsed_on_gpu(call: Callable[[], Any], count: int) -> float:
    """Seconds between two events of the GPU's around `count` calls."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _synchronizer(device: str) -> Callable[[], None]:
    return torch.cuda.synchronize if device.startswith("cuda") else lambda: None


def run_suite(
    rows: list[Workload],
    options: Options = Options(),
    progress: Callable[[int, int, dict[str, Any] | Workload], None] = lambda done, total, what: None,
    keep: Callable[[dict[str, Any]], None] = lambda bench: None,
) -> dict[str, Any]:
    """Run rows at every thread count of the options and return the JSON object of a bench.

    progress(done, total, what) is called with the row before it runs and with its result after, keep(bench) with
    the object so far: what there is of a run that is cut short. The thread count of the process is put back at the
    end.
    """
    before = torch.get_num_threads()
    results, rates = [], {}
    total = len(rows) * len(options.threads)
    bench = {
        "schema": SCHEMA,
        "machine": machine(options.device),
        "threads": list(options.threads),
        "budget": options.budget,
        "ceilings": rates,
        "rows": results,
    }
    try:
        for threads in options.threads:
            torch.set_num_threads(threads)
            ceilings = Ceilings(options.device)
            first = len(results)
            for row in rows:
                progress(len(results), total, row)
                results.append(run_row(row, threads, ceilings, options))
                _add_share(results[-1], row, ceilings)
                rates[str(threads)] = ceilings.measured()
                keep(bench)
                progress(len(results), total, results[-1])
            for row, result in zip(rows, results[first:], strict=True):
                _add_share(result, row, ceilings)
            rates[str(threads)] = ceilings.measured()
    finally:
        torch.set_num_threads(before)
    return bench


def save(bench: Mapping[str, Any], path: str | Path) -> None:
    """Write a bench as JSON, its keys sorted so that two runs differ only where they differ."""
    Path(path).write_text(json.dumps(bench, indent=1, sort_keys=True) + "\n")


def load(path: str | Path) -> dict[str, Any]:
    """Read a bench. Raises ValueError naming the file where it is not one, or has another schema."""
    try:
        bench = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a bench result: {error}") from None
    if not isinstance(bench, dict) or "schema" not in bench or "rows" not in bench:
        raise ValueError(f"{path} is not a bench result: it has no schema and rows")
    if bench["schema"] != SCHEMA:
        raise ValueError(f"{path} has schema {bench['schema']}, this version reads schema {SCHEMA}")
    return bench


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows that two benches share, with how our speed changed.

    Where both runs timed torch, the change is that of our ratio over torch, which another load or clock
    leaves alone; else that of our time. `noise` is the half-width of the two runs' quartiles; a change
    within it is "same".
    """
    before = {_key(row): row for row in old["rows"] if "times" in row}
    changes = []
    for row in new["rows"]:
        was = before.get(_key(row))
        if was is None or "times" not in row:
            continue
        if "torch" in row["ratios"] and "torch" in was["ratios"]:
            basis, now, then = "ratio over torch", row["ratios"]["torch"], was["ratios"]["torch"]
            change = now["median"] / then["median"]
        else:
            basis, now, then = "time", row["times"]["ours"], was["times"]["ours"]
            change = then["median"] / now["median"]
        noise = max(_spread(now), _spread(then))
        verdict = "same" if abs(change - 1) <= noise else "faster" if change > 1 else "slower"
        changes.append(
            {"suite": row["suite"], "name": row["name"], "threads": row["threads"], "basis": basis}
            | {
                "old": then["median"],
                "new": now["median"],
                "change": change,
                "noise": noise,
                "verdict": verdict,
            }
        )
    return changes


def _key(row: Mapping[str, Any]) -> tuple:
    return row["suite"], row["name"], row["threads"]


def _spread(numbers: Mapping[str, Any]) -> float:
    low, high = numbers["quartiles"]
    return max((high - low) / 2 / numbers["median"], 0.03)
