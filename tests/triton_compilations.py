"""Counts what Triton would compile for attention calls of many shapes; run by test_triton_attention.py in a process of
its own, where kernels are not interpreted. Nothing is compiled or launched: each launch is bound as Triton's launcher
does, and what it would look up in its cache of compiled kernels is collected."""

import json

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from fastattn import _triton

ATTENTION, DECODE, BACKWARD = (_triton.module(name) for name in ("attention", "decode", "attention_bwd"))
BACKEND = make_backend(GPUTarget("cuda", 90, 32))


class Recorder:
    """Stands for a kernel: keeps the keys of its launches."""

    def __init__(self, kernel):
        self.bind = create_function_from_signature(kernel.signature, kernel.params, BACKEND)
        self.keys = set()

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arguments, **keywords):
        _, specialization, options = self.bind(*arguments, **keywords)
        self.keys.add(f"{specialization} {sorted(options.items())}")


def compiled(shapes, **given) -> list[int]:
    """How many (attention, merge) kernels calls of these (B, Hq, Hkv, Sq, Sk, D) take."""
    kernel, merge = Recorder(ATTENTION.attention_kernel), Recorder(DECODE.merge_kernel)
    originals = ATTENTION.attention_kernel, DECODE.merge_kernel
    ATTENTION.attention_kernel, DECODE.merge_kernel = kernel, merge
    try:
        for B, Hq, Hkv, Sq, Sk, D in shapes:
            q, k = torch.empty(B, Hq, Sq, D).half(), torch.empty(B, Hkv, Sk, D).half()
            band = given.get("band_hi", lambda Sq, Sk: None)(Sq, Sk)
            hi = given["hi"](B, Hq, Sq, Sk) if "hi" in given else None
            ATTENTION.attention_fwd(
                q, k, k, D**-0.5, None, band, None, hi, *[None] * 5, 0.0, 0.0, *[None] * 7, None, False
            )
    finally:
        ATTENTION.attention_kernel, DECODE.merge_kernel = originals
    return [len(kernel.keys), len(merge.keys)]


def backward(shapes, **given) -> list[int]:
    """How many (row, pass) kernels the backward of such calls takes: of passes, one over rows and one over keys."""
    rows, passes = Recorder(BACKWARD.row_kernel), Recorder(BACKWARD.backward_kernel)
    originals = BACKWARD.row_kernel, BACKWARD.backward_kernel
    BACKWARD.row_kernel, BACKWARD.backward_kernel = rows, passes
    try:
        for B, Hq, Hkv, Sq, Sk, D in shapes:
            q, k = torch.empty(B, Hq, Sq, D).half(), torch.empty(B, Hkv, Sk, D).half()
            band = given.get("band_hi", lambda Sq, Sk: None)(Sq, Sk)
            hi = given["hi"](B, Hq, Sq, Sk) if "hi" in given else None
            BACKWARD.attention_bwd(
                q, None, q, k, k, q, torch.empty(B, Hq, Sq), D**-0.5, None, band, None, hi, *[None] * 7, 0.0, 0.0,
                *[None] * 8, [True] * 3 + [False] * 3, False,
            )  # fmt: skip
    finally:
        BACKWARD.row_kernel, BACKWARD.backward_kernel = originals
    return [len(rows.keys), len(passes.keys)]


LENGTHS = (65, 66, 80, 127, 128, 129, 256, 511, 513, 1000, 1024, 2047)
LONG = (513, 514, 528, 1024, 1025, 3000, 4096)
print(
    json.dumps(
        {
            "plain": compiled(
                [(2, 4, 2, n, n, 64) for n in LENGTHS] + [(1, 1, 1, 100, 1, 64), (3, 2, 2, 90, 7, 64)]
            ),
            "causal": compiled([(2, 4, 2, n, n + 3, 64) for n in LENGTHS], band_hi=lambda Sq, Sk: Sk - Sq),
            "narrow": compiled([(1, 2, 2, n, n, 40) for n in LENGTHS]),
            "padding": compiled(
                [(2, 4, 2, n, n, 64) for n in LENGTHS],
                hi=lambda B, H, Sq, Sk: torch.full((B, 1, 1), Sk, dtype=torch.int32).expand(B, H, Sq),
            ),
            "backward": backward([(2, 4, 2, n, n, 64) for n in LENGTHS] + [(3, 2, 2, 90, 7, 64)]),
            "causal backward": backward(
                [(2, 4, 2, n, n + 3, 40) for n in LENGTHS], band_hi=lambda Sq, Sk: Sk - Sq
            ),
            "padding backward": backward(
                [(2, 4, 2, n, n, 64) for n in LENGTHS],
                hi=lambda B, H, Sq, Sk: torch.full((B, H, Sq), Sk, dtype=torch.int32),
            ),
            "decode": compiled([(b, 4, 2, 1, n, 64) for n in LONG for b in (1, 2, 17)]),
            "prefill": compiled([(1, 4, 2, n, n, 64) for n in range(1, 200, 3)]),
        }
    )
)
