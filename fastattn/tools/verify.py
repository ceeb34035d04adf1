"""Check on this machine that every kernel gives the reference's answer.

Each row is an op, dtype, mask and shape. Its result is compared with a float64 answer: our error may be at
most twice that of torch's own op in the same dtype, and a rounding band. Masks are read back exactly, key
by key, since losing one key of many would pass any tolerance. The exit code is 1 if a row fails.

  fastattn verify --quick
  fastattn verify --isa all
  fastattn verify --only causal --json verify.json
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from . import report, workloads
from .cases import (
    NotAvailable,
    attention_inputs,
    dense_mask,
    extras,
    kernel_of,
    our_call,
    row_inputs,
    torch_arguments,
)
from .equivalence import Verdict, check_visible, error_rule
from .machine import instruction_set, introspection, machine, machine_line
from .progress import Progress
from .workloads import Workload

SCHEMA = 1
COLUMNS = ("row", "isa", "kernel", "error", "torch's", "limit", "mask", "verdict")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="fewer shapes, masks and dtypes")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default cpu)")
    parser.add_argument(
        "--isa", metavar="NAME", help="force an instruction set, or all that run here one after another (all)"
    )
    parser.add_argument(
        "--only", metavar="PATTERN", help="rows whose name contains, or as a pattern matches, this"
    )
    parser.add_argument("--json", metavar="FILE", help="write the verdicts; - is standard output")


def run(arguments: argparse.Namespace) -> int:
    from .cli import CommandError

    device = arguments.device
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise CommandError(f"--device {device}: this torch ({torch.__version__}) sees no GPU")
    if not device.startswith(("cpu", "cuda")):
        raise CommandError(f"--device must be cpu, cuda or cuda:N, got {device!r}")
    isas = _isas(arguments.isa)
    rows = workloads.matching(workloads.verify_rows(arguments.quick), arguments.only)
    if not rows:
        raise CommandError(f"no row matches --only {arguments.only!r}")
    progress, results = Progress(len(rows) * len(isas)), []
    for isa in isas:
        with forced(isa):
            for row in rows:
                progress.begin(row.name)
                results.append(check(row, device))
                last = results[-1]
                if progress.live or last["verdict"] == "FAIL":
                    progress.step(
                        f"{row.name}: {last['verdict']}" + (f" ({last['why']})" if last["why"] else "")
                    )
                else:
                    progress.done += 1
    progress.close()
    outcome = {"schema": SCHEMA, "machine": machine(device), "device": device, "rows": results}
    outcome |= {
        verdict: sum(r["verdict"] == verdict for r in results) for verdict in ("ok", "FAIL", "not available")
    }
    stream = sys.stderr if arguments.json == "-" else sys.stdout
    print(machine_line(outcome["machine"]), file=stream)
    report.table("", COLUMNS, [_cells(result) for result in results], stream)
    for result in results:
        if result["verdict"] == "FAIL":
            print(f"FAIL {result['name']} ({result['isa']}): {result['why']}", file=stream)
    for reason in dict.fromkeys(r["why"] for r in results if r["verdict"] == "not available"):
        print(f"not available: {reason}", file=stream)
    print(f"{outcome['ok']} of {len(results)} rows ok, {outcome['FAIL']} failed", file=stream)
    if arguments.json:
        text = json.dumps(outcome, indent=1, sort_keys=True) + "\n"
        if arguments.json == "-":
            sys.stdout.write(text)
        else:
            Path(arguments.json).write_text(text)
    return 1 if outcome["FAIL"] or not outcome["ok"] else 0


def _isas(asked: str | None) -> list[str | None]:
    from .cli import CommandError

    if asked is None:
        return [None]
    info = introspection()
    available = list(info.available_isas()) if info else []
    if asked == "all" and available:
        return available
    if asked not in available:
        raise CommandError(f"--isa must be all or one of {', '.join(available) or 'none'}, got {asked!r}")
    return [asked]


@contextlib.contextmanager
def forced(isa: str | None) -> Iterator[None]:
    """Run on another instruction set inside the block; None leaves the one in use."""
    if isa is None:
        yield
        return
    before = instruction_set()
    torch.ops.fastattn._set_isa(isa)
    _FORCED.append(isa)
    try:
        yield
    finally:
        _FORCED.pop()
        torch.ops.fastattn._set_isa(before)


_FORCED: list[str] = []


def failures(quick: bool = True, device: str = "cpu") -> list[str]:
    """The rows that fail, as text; empty where everything that is available is right."""
    results = [check(row, device) for row in workloads.verify_rows(quick)]
    failed = [f"{result['name']}: {result['why']}" for result in results if result["verdict"] == "FAIL"]
    if not failed and not any(result["verdict"] == "ok" for result in results):
        failed = ["no row could be checked"]
    return failed


def check(row: Workload, device: str = "cpu") -> dict[str, Any]:
    """Run and judge one row; never raises. Verdicts are "ok", "FAIL" and "not available"."""
    start = time.perf_counter()
    result: dict[str, Any] = {
        "name": row.name,
        "op": row.op,
        "dtype": row.dtype,
        "shape": dataclasses.asdict(row.shape),
        "mask": row.mask,
        "isa": _FORCED[-1] if _FORCED else instruction_set(),
    }
    try:
        result |= _check_attention(row, device) if row.op == "attention" else _check_rows(row, device)
    except NotAvailable as reason:
        result |= {"verdict": "not available", "why": str(reason)}
    except Exception as error:
        result |= {"verdict": "FAIL", "why": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    return result | {"seconds": time.perf_counter() - start}


def _judge(compared: list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor | None]]) -> dict[str, Any]:
    """The verdict over named (ours, exact, torch's): one that fails, else the one nearest to its limit."""
    return _worst([(name, error_rule(ours, exact, theirs)) for name, ours, exact, theirs in compared])


def _worst(verdicts: list[tuple[str, Verdict]]) -> dict[str, Any]:
    name, worst = max(verdicts, key=lambda named: (not named[1], named[1].ours / max(named[1].limit, 1e-300)))
    return {
        "error": _number(worst.ours),
        "torch": _number(worst.theirs),
        "limit": _number(worst.limit),
        "verdict": "ok" if worst else "FAIL",
        "why": "" if worst else f"{name}: {worst.reason}",
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _check_attention(row: Workload, device: str) -> dict[str, Any]:
    from fastattn import reference

    q, k, v = attention_inputs(row, device)
    dense, added = dense_mask(row, device), extras(row, device)
    function, arguments = our_call(row, row.spelling, (q, k), device)
    rich, rich_arguments = our_call(row, row.spelling, (q, k), device, richer=True)
    doubled = [x.detach().double().requires_grad_(row.training) for x in (q, k, v)]
    exact_added = {n: x.double() if isinstance(x, torch.Tensor) else x for n, x in added.items()}
    exact, exact_lse = reference.attention(*doubled, mask=dense, return_lse=True, **exact_added)
    theirs = _torch_call(row, (q, k, v), dense, added, device)
    result: dict[str, Any] = {"kernel": kernel_of((q, k, v), rich_arguments)}
    if row.training:
        return result | _check_gradients(
            lambda: function(q, k, v, **arguments), theirs, (q, k, v), exact, doubled
        )
    out, lse = rich(q, k, v, return_lse=True, **rich_arguments)
    comparator = theirs() if theirs else None
    verdicts = [
        ("out", error_rule(out, exact, comparator)),
        ("lse", _judge_lse(lse, exact_lse, row.torch_dtype)),
    ]
    if function is not rich:
        verdicts.append(("drop-in", error_rule(function(q, k, v, **arguments), exact, comparator)))
    result |= _worst(verdicts)
    if not added:
        result |= _check_mask(row, device, dense, rich, result)
    return result


def _judge_lse(lse: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> Verdict:
    """An LSE is float32, and right to float32's rounding or to what the inputs' dtype can tell: an error of
    d in it scales a merged partial by exp(d), which is lost in that dtype's own rounding below eps / 2."""
    finite = exact[exact.isfinite()].abs()
    largest = finite.max().item() if finite.numel() else 0.0
    told = torch.finfo(dtype).eps / 2 / (32 * torch.finfo(torch.float32).eps)
    return error_rule(lse, exact, magnitude=max(largest, told))


def _torch_call(row: Workload, qkv: tuple, dense, added: dict[str, Any], device: str) -> Callable | None:
    """torch's own call of the same thing, or None where its signature cannot say it."""
    if added.keys() - {"bias"}:
        return None
    keywords = torch_arguments(row, device)
    if "bias" in added:
        keywords.pop("is_causal", None)
        keywords["attn_mask"] = (
            added["bias"] if dense is None else added["bias"].masked_fill(~dense, -math.inf)
        )
    return lambda: F.scaled_dot_product_attention(*qkv, **keywords)


def _check_gradients(ours: Callable, theirs: Callable | None, inputs, exact, doubled) -> dict[str, Any]:
    for x in inputs:
        x.requires_grad_()
    dout = torch.randn(exact.shape, generator=torch.Generator().manual_seed(0)).to(inputs[0])
    gradients = torch.autograd.grad(ours(), inputs, dout)
    right = torch.autograd.grad(exact, doubled, dout.double())
    compared = torch.autograd.grad(theirs(), inputs, dout) if theirs else (None,) * 3
    return _judge(list(zip(("dq", "dk", "dv"), gradients, right, compared, strict=True)))


def _check_mask(row: Workload, device: str, dense, rich: Callable, judged: dict[str, Any]) -> dict[str, Any]:
    """The exact test, for this row's spelling of the mask."""
    shape = row.shape
    if dense is None:
        dense = torch.ones(shape.sq, shape.sk, dtype=torch.bool, device=device)
    full = dense.expand(torch.broadcast_shapes(dense.shape, (1, 1, shape.sq, shape.sk)))
    seen = check_visible(
        lambda q, k, v: rich(
            q, k, v, return_lse=True, **our_call(row, row.spelling, (q, k), device, richer=True)[1]
        ),
        full,
        shape.b,
        shape.hq,
        shape.hkv,
        row.torch_dtype,
        device,
        D=shape.d,
        Dv=shape.dv,
    )
    if seen:
        return {"exact_mask": "exact"}
    why = judged["why"] or f"mask: {seen}"
    return {"exact_mask": "WRONG", "verdict": "FAIL", "why": why}


def _check_rows(row: Workload, device: str) -> dict[str, Any]:
    from fastattn import reference

    ours, theirs, operands = row_inputs(row, device)
    exact, _, exact_operands = row_inputs(row, device, getattr(reference, row.op), torch.float64)
    if row.training:
        names = [f"gradient {index}" for index in range(len(operands))]
        results = [_row_gradients(call, operands) for call in (ours, theirs)]
        results.insert(1, _row_gradients(exact, exact_operands))
    else:
        results = [_outputs(call()) for call in (ours, exact, theirs)]
        names = ("out",) if len(results[0]) == 1 else ("norm", "sum")
    return {"kernel": None} | _judge(list(zip(names, *results, strict=True)))


def _outputs(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _row_gradients(call: Callable, operands: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Gradients of the operands for a random gradient of every output, the same numbers for every dtype."""
    for tensor in operands:
        tensor.requires_grad_()
    outputs = _outputs(call())
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in outputs]
    return torch.autograd.grad(outputs, operands, gradients)


def _cells(result: dict[str, Any]) -> tuple[str, ...]:
    def number(name):
        value = result.get(name)
        return "-" if value is None else f"{value:.2e}"

    return (
        result["name"],
        result["isa"],
        result.get("kernel") or "-",
        number("error"),
        number("torch"),
        number("limit"),
        result.get("exact_mask", "-"),
        result["verdict"],
    )
