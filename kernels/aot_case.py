"""One compilation of a kernel that `python -m fastattn.tools.aot` makes: a row of the launch table, with dtypes.

Every kernel module has ``aot_cases()``, which yields these. No Triton is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# NVIDIA by compute capability, AMD by architecture.
NVIDIA = ("sm_80", "sm_90", "sm_100", "sm_120")
AMD = ("gfx942",)
TARGETS = NVIDIA + AMD


@dataclass(frozen=True)
class AotCase:
    """What Triton needs to compile one kernel, and what is expected of the result.

    name: lasting, and unique in its module for each target: the committed table of resources is keyed by it.
    fn: the kernel, as @triton.jit made it. Helpers that it calls need no case of their own.
    signature: the arguments that are no constexpr, in any order, to Triton's types: "*fp16", "*i1", "i32", "i64",
        "fp32". An argument that is None in a launch is not listed here but in `constexprs`, as None.
    constexprs: every other argument, to its value.
    num_warps, num_stages: as launched.
    divisible_by_16: the arguments that launches usually see as multiples of 16 (pointers of aligned tensors, strides
        of even sizes). Triton specialises on it: it is what lets an access be 16 bytes wide.
    tensor_cores: a matrix instruction has to be in the code.
    targets: those that launch this row; where the launch differs by architecture there is a case for each.
    oldest: the first Triton that compiles it; dispatch refuses an older one.
    """

    name: str
    fn: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    divisible_by_16: tuple[str, ...] = ()
    tensor_cores: bool = False
    targets: tuple[str, ...] = TARGETS
    oldest: tuple[int, int] = (3, 6)
