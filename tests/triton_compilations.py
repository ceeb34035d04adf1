"""Counts what Triton would compile for attention calls of many shapes; run by test_triton_attention.py in a process of
its own, where kernels are not interpreted. Nothing is compiled or launched: each launch is bound as Triton's launcher
does, and what it would look up in its cache of compiled kernels is collected."""

import json

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from fastattn import _triton, masks
from fastattn.masks.lower import lower

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


def forward(q, k, band, hi, blocks):
    ATTENTION.attention_fwd(
        q,
        k,
        k,
        q.shape[3] ** -0.5,
        None,
        band,
        None,
        hi,
        *blocks[:3],
        None,
        None,
        0.0,
        0.0,
        *[None] * 7,
        None,
        False,
    )


def backward(q, k, band, hi, blocks):
    offsets, entries, tiles, offsets_t, entries_t = blocks
    BACKWARD.attention_bwd(
        q, None, q, k, k, q, torch.empty(q.shape[:3]), q.shape[3] ** -0.5, None, band, None, hi, offsets, entries,
        offsets_t, entries_t, tiles, None, None, 0.0, 0.0, *[None] * 8, [True] * 3 + [False] * 3, False,
    )  # fmt: skip


KERNELS = {
    forward: ((ATTENTION, "attention_kernel"), (DECODE, "merge_kernel")),
    backward: ((BACKWARD, "row_kernel"), (BACKWARD, "backward_kernel")),
}


def compiled(call, shapes, band_hi=None, hi=None, mask=None) -> list[int]:
    """How many (attention, merge) or (row, pass) kernels a call takes of these (B, Hq, Hkv, Sq, Sk, D); of passes, one
    over rows and one over keys. band_hi, hi, mask: of a shape."""
    originals = [getattr(module, name) for module, name in KERNELS[call]]
    recorders = [Recorder(kernel) for kernel in originals]
    try:
        for (module, name), recorder in zip(KERNELS[call], recorders, strict=True):
            setattr(module, name, recorder)
        for B, Hq, Hkv, Sq, Sk, D in shapes:
            q, k = torch.empty(B, Hq, Sq, D).half(), torch.empty(B, Hkv, Sk, D).half()
            band = band_hi(Sq, Sk) if band_hi else None
            blocks = [None] * 5
            if mask:
                lowered = lower(mask(Sq, Sk), B, Hq, Hkv, Sq, Sk, q.device)
                blocks = [*lowered.bits(), *lowered.transpose()]
            call(q, k, band, hi(B, Hq, Sq, Sk) if hi else None, blocks)
    finally:
        for (module, name), kernel in zip(KERNELS[call], originals, strict=True):
            setattr(module, name, kernel)
    return [len(recorder.keys) for recorder in recorders]


LENGTHS = (65, 66, 80, 127, 128, 129, 256, 511, 513, 1000, 1024, 2047)
LONG = (513, 514, 528, 1024, 1025, 3000, 4096)
SQUARE = [(2, 4, 2, n, n, 64) for n in LENGTHS]


def of_each_mask(call) -> dict[str, list[int]]:
    return {
        "plain": compiled(call, SQUARE + [(1, 1, 1, 100, 1, 64), (3, 2, 2, 90, 7, 64)]),
        "windows": compiled(call, [(2, 4, 2, n, n + 3, 64) for n in LENGTHS], lambda Sq, Sk: Sq % 23),
        "narrow": compiled(call, [(1, 2, 2, n, n, 40) for n in LENGTHS]),
        "padding": compiled(
            call,
            SQUARE,
            hi=lambda B, H, Sq, Sk: torch.full((B, 1, 1), Sk, dtype=torch.int32).expand(B, H, Sq),
        ),
        "bits": compiled(call, SQUARE, mask=lambda Sq, Sk: masks.Strided(Sq % 23 + 3)),
    }


print(
    json.dumps(
        {
            "forward": of_each_mask(forward),
            "backward": of_each_mask(backward),
            "decode": compiled(forward, [(b, 4, 2, 1, n, 64) for n in LONG for b in (1, 2, 17)]),
            "prefill": compiled(forward, [(1, 4, 2, n, n, 64) for n in range(1, 200, 3)]),
        }
    )
)
