"""One line, and one JSON object, about the machine and the build that a number comes from."""

from __future__ import annotations

import datetime
import importlib.util
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import fastattn


def cpu_model() -> str:
    """The processor's name as the system gives it, with family and model where it has them."""
    try:
        fields = dict(
            (part.strip() for part in line.split(":", 1))
            for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
            if ":" in line
        )
    except (OSError, ValueError):
        return platform.processor() or platform.machine()
    name = fields.get("model name") or fields.get("Processor") or platform.machine()
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']} model {fields.get('model', '?')})"
    return name


def introspection() -> Any:
    """The module `fastattn._info`, or None where the compiled part is not built."""
    try:
        from fastattn import _info
    except ImportError:
        return None
    return _info


def instruction_set() -> str:
    """The instruction set whose kernels run, or "none" without the compiled part."""
    info = introspection()
    return info.isa() if info else "none"


def version(package: str) -> str | None:
    """An installed distribution's version, or None."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def revision() -> str | None:
    """The git revision of the source tree that fastattn runs from, with "+" if it has changes; None outside
    one."""
    root = Path(fastattn.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "--short=10", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changed else "")


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()


def triton_version() -> str | None:
    """Triton's version without importing it, or None."""
    return (version("triton") or "installed") if importlib.util.find_spec("triton") else None


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a result must carry to be read later: processor, instruction set, versions, revision, date."""
    facts = {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "isa": instruction_set(),
        "torch": torch.__version__,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "fastattn": fastattn.__version__,
        "revision": revision(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }
    if device.startswith("cuda"):
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = torch.version.cuda
        facts["triton"] = triton_version()
    return facts


def machine_line(facts: dict[str, Any]) -> str:
    """The facts of `machine` in one line."""
    parts = [facts["gpu"]] if facts.get("gpu") else []
    parts += [facts["cpu"], f"{facts['cores']} cores", f"{facts['isa']} kernels"]
    parts += [f"torch {facts['torch']} ({facts['torch_isa']})"]
    revision_text = f" ({facts['revision']})" if facts.get("revision") else ""
    return ", ".join([*parts, f"fastattn {facts['fastattn']}{revision_text}", facts["date"]])
