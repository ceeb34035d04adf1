"""The one table of what fastattn measures and verifies.

A `Workload` is a row: an operation, its sizes and dtype, how the mask is written, what it costs by formula,
and the ratio over torch that it must reach. `python -m fastattn bench`, `benches/`, `verify` and the
README's tables all read these rows; `cases.py` turns one into inputs and callables.

Work is counted by what a caller asked for, not by what a kernel does:

- attention, forward: 2 * visible * (D + Dv) floating-point operations, where visible is the number of
  (batch, query
  head, query, key) tuples that the mask shows; forward and backward: 3.5 times that (5 products beside 2).
- few query rows (decode): bytes of K and V that are visible, each read once for a group of query heads.
- modules: 2 floating-point operations a weight and token, and attention's; three times that with the backward.
- row operations: bytes of every input and output, each moved once.
- lowering a mask: the bytes of the square as a boolean or, for that spelling, additive tensor.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools

import torch

from .families import FAMILIES, AttentionShape, padding_lengths

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}

FORWARD_AND_BACKWARD = 3.5

FEATURES = {
    "dropout": "dropout of 0.1",
    "bias-full": "an additive bias [1, H, Sq, Sk], with a gradient where there is a backward",
    "bias-row": "an additive bias [1, H, 1, Sk], with a gradient where there is a backward",
    "alibi": "ALiBi slopes",
    "softcap": "scores capped at 5",
    "sinks": "a sink a head",
    "decode": "few query rows: the work is reading K and V",
    "out": "results written into tensors that the caller gives",
    "latency": "what a call costs when there is nothing to compute",
    "long": "a sequence whose square would not fit into memory",
    "area": "beside the unmasked call: time must follow the visible area",
    "spelling": "beside the mask object: all ways of writing a mask cost the same",
    "dense": "beside torch with the same boolean tensor",
}


@dataclasses.dataclass(frozen=True)
class RowShape:
    """`rows` independent rows of `width` elements."""

    rows: int
    width: int

    def __str__(self):
        return f"{self.rows}x{self.width}"


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """A whole model, by its name in `models.MODELS`."""

    model: str

    def __str__(self):
        return self.model


CEILING = "the ceiling"


@dataclasses.dataclass(frozen=True)
class Limit:
    """A promise about one row: the variant `against` takes at least `floor` times as long as the variant
    `of`; against CEILING, ours reaches that share of the ceiling measured in the same run."""

    against: str
    floor: float
    why: str = ""
    of: str = "ours"


@dataclasses.dataclass(frozen=True)
class Workload:
    """One row of the table.

    op: "attention", "mask-build", "mask-scan", "softmax", "layer_norm", "rms_norm", "add_layer_norm",
    "add_rms_norm", "model", or a module: "mha", "encoder" (6 layers) and "encoder-layer".
    mask: a name in `families.FAMILIES`; spelling: how our side is given it ("flag", "object", "bool",
    "additive", "prepared"). features: what else is asked for, see `FEATURES`.
    training: forward and backward. quick: part of the short form of its suite. rivals: worth timing rivals
    on; beside: those alone, by name, where it names any.
    """

    suite: str
    op: str
    dtype: str
    shape: AttentionShape | RowShape | ModelShape
    mask: str = "none"
    spelling: str = "flag"
    features: tuple[str, ...] = ()
    training: bool = False
    limits: tuple[Limit, ...] = ()
    quick: bool = False
    rivals: bool = True
    beside: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What `--only` matches and results are compared by; unique in its suite."""
        parts = [self.op] if self.op != "attention" else []
        parts += [self.dtype, str(self.shape)]
        if isinstance(self.shape, AttentionShape):
            parts.append(self.mask)
            if self.spelling != default_spelling(self.mask):
                parts.append(self.spelling)
            if self.shape.rank != 4:
                parts.append(f"{self.shape.rank}d")
        parts += self.features
        if self.training:
            parts.append("training")
        return "-".join(parts)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def unit(self) -> str:
        """ "flops", "bytes" or "calls": what `work` counts and which ceilings bound it."""
        if self.op == "model":
            return "calls"
        counted = self.op in ("attention", *MODULE_OPS) and "decode" not in self.features
        return "flops" if counted else "bytes"

    @property
    def ceiling(self) -> str | None:
        """The ceiling that bounds it: a dtype's arithmetic ("fp16-training" with its backward's),
        "read" or "copy" (see `ceilings.py`); None for what no machine's limit explains, a call's latency, the
        building of a mask from its formula, a whole model."""
        if self.op in ("mask-build", "model") or "latency" in self.features:
            return None
        if self.unit == "flops":
            return "fp16-training" if self.dtype == "fp16" and self.training else self.dtype
        return "read" if self.op in ("attention", "mask-scan") else "copy"

    @functools.cached_property
    def work(self) -> float:
        """Floating-point operations or bytes of one call, by the formulas at the top of this file."""
        return work_of(self)


# The modules, and how many layers of a Transformer each has; width is heads * head size, 4 times that between.
MODULE_OPS = {"mha": 0, "encoder": 6, "encoder-layer": 1}


def _module_work(row: Workload) -> float:
    """A module's matrix products: a stack is asked for its real tokens, a single module for every row."""
    shape, layers = row.shape, MODULE_OPS[row.op]
    width, lengths = shape.hq * shape.d, padding_lengths(shape, 50)
    if row.op == "encoder":
        tokens, pairs = sum(lengths), sum(n * n for n in lengths)
    else:
        tokens, pairs = shape.b * shape.sq, shape.sq * sum(lengths)
    products = tokens * width * width * (4 + (8 if layers else 0)) + 2 * pairs * width
    return 2.0 * max(layers, 1) * products * (3.0 if row.training else 1.0)


def work_of(row: Workload) -> float:
    """The FLOPs or bytes formula of one row."""
    size = torch.finfo(row.torch_dtype).bits // 8
    if row.op == "model":
        return 1.0
    if row.op in MODULE_OPS:
        return _module_work(row)
    if row.op == "attention":
        shape = row.shape
        pairs = FAMILIES[row.mask].visible_pairs(shape)
        if row.unit == "bytes":
            visible_keys = pairs / (shape.hq * shape.sq)
            return visible_keys * shape.hkv * (shape.d + shape.dv) * size
        return 2.0 * pairs * (shape.d + shape.dv) * (FORWARD_AND_BACKWARD if row.training else 1.0)
    if row.op in ("mask-scan", "mask-build"):
        # The whole square as a tensor, whether or not the spelling ever makes one.
        return float(row.shape.sq * row.shape.sk * (size if row.spelling == "additive" else 1))
    moves, backward, weights = ROW_TRAFFIC[row.op]
    total = moves + (backward if row.training else 0)
    return size * (total * float(row.shape.rows) * row.shape.width + weights * row.shape.width)


# op -> (tensors moved forward, tensors moved backward, weight vectors). Backward of softmax reads y and dy
# and writes dx; that of a norm reads x and dy and writes dx; the sum of add + norm is one more output
# forward, while backward its gradient serves both inputs.
ROW_TRAFFIC = {
    "softmax": (2, 3, 0),
    "layer_norm": (2, 3, 2),
    "rms_norm": (2, 3, 1),
    "add_layer_norm": (4, 3, 2),
    "add_rms_norm": (4, 3, 1),
}


def default_spelling(mask: str) -> str:
    """How a caller would write this mask: torch's flag, the padding tensor that models carry, else an
    object."""
    if mask in ("none", "causal"):
        return "flag"
    return "bool" if mask == "padding50" else "object"


def _attention(suite, dtype, shape, mask="none", floor=None, *, spelling=None, why="", **fields) -> Workload:
    limits = (Limit("torch", floor, why),) if floor else ()
    spelling = spelling or default_spelling(mask)
    return Workload(suite, "attention", dtype, shape, mask, spelling, limits=limits, **fields)


def _rows(suite, op, dtype, shape, floor=None, **fields) -> Workload:
    limits = (Limit("torch", floor),) if floor else ()
    return Workload(suite, op, dtype, RowShape(*shape), limits=limits, **fields)


S128, S512, S1024 = (
    AttentionShape(1, 16, 128, 64),
    AttentionShape(8, 12, 512, 64),
    AttentionShape(1, 12, 1024, 64),
)
LONG = [AttentionShape(1, 16, s, 128) for s in (1024, 2048, 4096)]


def _cpu_forward():
    suite = "cpu-forward"

    def grid(dtype, shape, floors, **fields):
        for mask, floor in floors.items():
            yield _attention(suite, dtype, shape, mask, floor, **fields)

    bf16 = {"none": 2.0, "causal": 3.0, "padding50": 3.8}
    yield from grid("bf16", S128, bf16, quick=True)
    yield from grid("bf16", S512, bf16)
    yield from grid("bf16", S1024, bf16 | {"window256": 6.0})
    bf16_long = {"none": 1.7, "causal": 1.9, "padding50": 3.4}
    yield from grid("bf16", LONG[0], bf16_long, quick=True)
    yield from grid("bf16", LONG[1], bf16_long | {"window256": 10.0})
    yield from grid("bf16", LONG[2], bf16_long | {"window256": None})
    fp16 = {"none": 2.0, "causal": 2.0, "padding50": 3.0, "window256": 5.0}
    yield from grid("fp16", S1024, fp16, quick=True)
    yield from grid("fp16", LONG[1], fp16)
    fp32 = {"none": 1.3, "causal": 2.0, "padding50": 2.3}
    yield from grid("fp32", S128, fp32, quick=True)
    yield from grid("fp32", S512, fp32)
    fp32_long = {"none": 1.05, "causal": 1.3, "padding50": 2.3, "window256": 5.0}
    yield from grid("fp32", S1024, fp32_long, quick=True)
    yield from grid("fp32", LONG[1], fp32_long)
    yield _attention(suite, "bf16", AttentionShape(12, 1, 1024, 64, rank=3), "none", 8.0, quick=True)
    yield _attention(suite, "bf16", AttentionShape(1, 12, 1024, 64, dv=128), "none", 8.0, quick=True)
    for length, size, floors in ((512, 64, bf16), (2048, 128, bf16_long)):
        yield from grid("bf16", AttentionShape(1, 32, length, size, hkv=8), floors, quick=length == 512)
    smallest = AttentionShape(1, 1, 1, 64)
    yield _attention(
        suite,
        "fp32",
        smallest,
        floor=1 / 1.5,
        features=("latency",),
        quick=True,
        why="at most 1.5 x torch's time",
    )


def _cpu_rows():
    suite = "cpu-rows"
    for dtype, floor in (("fp32", 1.15), ("bf16", 1.6)):
        for shape in ((4096, 128), (4096, 1024), (1024, 32768), (32, 128256)):
            yield _rows(suite, "softmax", dtype, shape, floor, quick=shape == (4096, 1024))
    norms = ((4096, 768), (4096, 4096), (16384, 1024))
    for op, floors in (
        ("layer_norm", {"fp32": 1.2, "bf16": 1.2}),
        ("rms_norm", {"fp32": 2.5, "bf16": 5.0}),
        ("add_layer_norm", {"fp32": 1.3, "bf16": 1.3}),
        ("add_rms_norm", {"fp32": 2.5, "bf16": 5.0}),
    ):
        for dtype, floor in floors.items():
            for shape in norms:
                yield _rows(suite, op, dtype, shape, floor, quick=shape == norms[0])
            if op == "add_layer_norm":
                # Past 32 MB an output that is written again costs no page faults: where `out=` pays.
                yield _rows(suite, op, dtype, (32768, 1024), 2.5, features=("out",))


# Masks whose time must follow the visible area in every dtype and head size, the other points of their lines,
# and the masks that `verify` reads back.
# fmt: off
AREA_MASKS = (
    "causal", "window256", "padding50", "documents9", "prefix25", "chunked8", "longformer256", "bigbird3",
    "strided128", "fixed128", "stride4", "blocks5", "blocks10", "blocks25", "blocks50",
)
MORE_AREA_MASKS = (
    "window64", "window1024", "window2048", "padding25", "padding75", "documents3", "documents32", "prefix50",
    "prefix75", "chunked4", "chunked16", "longformer512", "longformer1024", "bigbird1", "bigbird9", "stride2",
    "stride8",
)
VERIFY_MASKS = (
    "none", "causal", "causal-lower-right", "window16", "padding50", "documents3", "prefix25", "chunked4",
    "longformer32", "bigbird1", "strided32", "fixed32", "stride2", "blocks25",
)
# fmt: on


def _masks():
    suite = "masks"
    square = AttentionShape(1, 16, 4096, 64)
    for dtype in ("bf16", "fp32"):
        for size in (64, 128):
            shape = dataclasses.replace(square, d=size, dv=size)
            yield _attention(suite, dtype, shape, "none", 1.7 if dtype == "bf16" else 1.05, rivals=False)
            main = dtype == "bf16" and size == 64
            for mask in AREA_MASKS + (MORE_AREA_MASKS if main else ()):
                # Compiling flex_attention takes longer than all else here: once a mask is enough.
                beside_flex = main and mask in AREA_MASKS
                yield Workload(
                    suite,
                    "attention",
                    dtype,
                    shape,
                    mask,
                    "object",
                    ("area",),
                    limits=(Limit("flex_attention", 1.5),) if beside_flex else (),
                    quick=main and mask in ("causal", "window256", "blocks10"),
                    rivals=beside_flex,
                )
    for mask, spellings in (
        ("causal", ("flag", "bool", "additive", "prepared")),
        ("window256", ("bool", "additive", "prepared")),
        ("padding50", ("bool", "additive", "prepared")),
        ("blocks10", ("bool", "additive", "prepared")),
    ):
        for spelling in spellings:
            yield _attention(
                suite,
                "bf16",
                square,
                mask,
                spelling=spelling,
                features=("spelling",),
                quick=mask == "causal",
                rivals=False,
            )
    yield _attention(
        suite,
        "bf16",
        square,
        "blocks10",
        8.0,
        spelling="bool",
        why="the same boolean tensor, 10 % visible",
        features=("dense",),
    )
    for mask in AREA_MASKS:
        limits = (Limit("unmasked", 50.0, "at most 2 % of the unmasked attention's time"),)
        yield Workload(
            suite, "mask-build", "bf16", square, mask, "object", limits=limits, quick=mask == "window256"
        )
        endless = AttentionShape(1, 1, 131072, 64)
        yield Workload(suite, "mask-build", "bf16", endless, mask, "object", ("long",))
    for mask in ("causal", "blocks10"):
        for spelling in ("bool", "additive"):
            limits = (Limit("read", 1 / 1.3, "at most 1.3 x reading the tensor once"),)
            yield Workload(suite, "mask-scan", "bf16", square, mask, spelling, limits=limits, quick=True)


def _cpu_decode():
    suite = "cpu-decode"
    for dtype in ("bf16", "fp32"):
        for hkv in (32, 8, 1):
            for mask in ("none", "padding50"):
                shape = AttentionShape(4, 32, 1, 128, hkv=hkv, sk=4096)
                yield _attention(suite, dtype, shape, mask, features=("decode",), quick=hkv == 8)
    yield _attention(
        suite, "bf16", AttentionShape(1, 9, 1, 64, hkv=3, sk=512), features=("decode",), quick=True
    )


def _cpu_training():
    suite = "cpu-training"

    def grid(dtype, shape, floors, **fields):
        for mask, floor in floors.items():
            yield _attention(suite, dtype, shape, mask, floor, training=True, **fields)

    def bf16(floor):
        return {"none": floor, "causal": 1.3 * floor, "padding50": 1.5 * floor}

    yield from grid("bf16", S128, bf16(8.0), quick=True)
    yield from grid("bf16", S512, bf16(4.0))
    yield from grid("bf16", S1024, bf16(3.0))
    yield from grid("bf16", dataclasses.replace(S1024, sq=2048, sk=2048), bf16(3.0))
    yield from grid("bf16", LONG[0], bf16(2.3))
    yield from grid("bf16", AttentionShape(1, 32, 512, 64, hkv=8), bf16(4.0), quick=True)
    yield from grid("fp32", S128, {"none": 1.2, "causal": 2.0}, quick=True)
    yield from grid("fp32", S512, {"none": 1.2, "causal": 2.0})
    yield from grid("fp32", S1024, {"none": 1.2, "causal": 1.4})
    yield from grid("fp16", S512, {"none": 4.0, "causal": 4.0}, quick=True)
    for dtype, dropout, bias in (("fp32", 6.0, 2.0), ("bf16", 12.0, 4.0)):
        yield from grid(dtype, S512, {"none": dropout}, features=("dropout",), quick=True)
        yield from grid(dtype, S512, {"none": bias}, features=("bias-full",), quick=True)
        yield from grid(dtype, S512, {"none": bias}, features=("bias-row",))
    for op, floor in (
        ("softmax", 1.3),
        ("layer_norm", 1.3),
        ("rms_norm", 5.0),
        ("add_layer_norm", 1.3),
        ("add_rms_norm", 1.3),
    ):
        for dtype in ("fp32", "bf16"):
            yield _rows(suite, op, dtype, (4096, 1024), floor, training=True, quick=dtype == "bf16")


# What torch offers for a padded batch: the module as it is (its fast path in inference), without that path, and fed
# with nested tensors made from the padded ones. A promise over the best is one over each.
MODULE_RIVALS = ("torch", "torch slow path", "torch nested")


def _modules():
    def row(op, dtype, length, floor, training=False):
        against = MODULE_RIVALS[:1] if training else MODULE_RIVALS if op == "mha" else MODULE_RIVALS[:2]
        limits = tuple(
            Limit(
                name, floor, "the best of torch's ways", "ours nested" if name == "torch nested" else "ours"
            )
            for name in against
            if floor
        )
        shape = AttentionShape(8, 12, length, 64)
        return Workload(
            "modules",
            op,
            dtype,
            shape,
            "padding50",
            "bool",
            training=training,
            limits=limits,
            quick=length == 128,
            rivals=False,
        )

    for dtype in ("bf16", "fp32"):
        for length, mha, encoder in ((128, 1.15, 1.4), (512, 1.5, 1.8)):
            yield row("mha", dtype, length, mha)
            yield row("encoder", dtype, length, encoder)
            yield row("encoder-layer", dtype, length, 1.3 if dtype == "bf16" else None, training=True)


# Encoders that are swapped with pack=True, and without it beside that.
PACKING = ("bert-base", "roberta-base", "albert-base", "distilbert-base", "electra-small")
MODELS = (
    *PACKING,
    *"openai-gpt gpt2 llama-135m mistral-window qwen3-0.6b gemma2-softcap gpt-oss-sinks t5-small clip-vit-b32".split(),
    *"vit-base whisper-tiny longformer-base bigbird-base".split(),
)
# transformers refuses SDPA for them, or passes by what SDPA has no argument for.
WITHOUT_SDPA = frozenset(("openai-gpt", "gemma2-softcap", "gpt-oss-sinks", "longformer-base", "bigbird-base"))


def _models():
    for training in (False, True):
        for model in MODELS:
            for dtype in ("fp32", "bf16"):
                against = "eager" if model in WITHOUT_SDPA else "torch"
                limits = (Limit(against, 1 / 1.02, "at most 2 % slower"),)
                if model in PACKING:
                    limits = (Limit(against, 1 / 1.02, "at most 2 % slower", of="unpacked"),)
                    floor = 1.3 if dtype == "bf16" and not training else 1 / 1.02
                    limits += (Limit(against, floor, "no layer computes padding"),)
                quick = model in ("bert-base", "llama-135m")
                yield Workload(
                    "models",
                    "model",
                    dtype,
                    ModelShape(model),
                    training=training,
                    limits=limits,
                    quick=quick,
                    rivals=False,
                )


@dataclasses.dataclass(frozen=True)
class Suite:
    """A named list of rows."""

    name: str
    title: str
    rows: tuple[Workload, ...]


def _suite(name, title, rows) -> Suite:
    return Suite(name, title, tuple(rows()))


def _on_gpu(name):
    def rows():
        from . import workloads_gpu  # it imports this module

        return getattr(workloads_gpu, name)()

    return rows


SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        _suite("cpu-forward", "attention, forward, on the CPU", _cpu_forward),
        _suite("cpu-rows", "softmax and the norms, forward, on the CPU", _cpu_rows),
        _suite("masks", "time against the visible area, for every mask and every way of writing it", _masks),
        _suite("cpu-decode", "attention of one query row over a long cache, on the CPU", _cpu_decode),
        _suite("cpu-training", "forward and backward on the CPU", _cpu_training),
        _suite("modules", "drop-in modules of BERT-base's widths, half of the batch padding", _modules),
        _suite("models", "whole models, swapped, beside the same in SDPA and in eager attention", _models),
        _suite("gpu-attention", "attention, forward and backward, on a GPU", _on_gpu("attention")),
        _suite("gpu-masks", "documents, windows and boolean tensors on a GPU", _on_gpu("masks")),
        _suite("gpu-decode", "attention of one query row over a long cache, on a GPU", _on_gpu("decode")),
        _suite("gpu-rows", "softmax and the norms, both directions, on a GPU", _on_gpu("rows")),
    )
}


def select(suite: str, *, quick: bool = False, only: str | None = None) -> list[Workload]:
    """The rows of a suite, in order.

    quick keeps its short form, only what `matching` matches. Raises KeyError for an unknown suite.
    """
    return matching([row for row in SUITES[suite].rows if row.quick or not quick], only)


def matching(rows: list[Workload], only: str | None) -> list[Workload]:
    """The rows whose name matches a shell pattern, or contains it if it has no wildcard."""
    if not only:
        return rows
    pattern = only if any(c in only for c in "*?[") else f"*{only}*"
    return [row for row in rows if fnmatch.fnmatchcase(row.name, pattern)]


def held_to(rows: list[Workload], isa: str) -> list[Workload]:
    """The rows with the floors of an instruction set. The table's are those of AVX-512 and beyond; on AVX2 and
    NEON the promise is not to be slower than torch, held to the same; scalar kernels promise nothing."""
    if isa not in ("avx2", "neon", "scalar"):
        return rows
    kept = {"avx2": 1.0, "neon": 1.0, "scalar": None}[isa]

    def limits(row):
        for limit in row.limits:
            if limit.against not in MODULE_RIVALS:
                yield limit
            elif kept is not None:
                yield dataclasses.replace(limit, floor=min(limit.floor, kept))

    return [dataclasses.replace(row, limits=tuple(limits(row))) for row in rows]


def verify_rows(quick: bool = False) -> list[Workload]:
    """What `verify` checks: each op x dtype x mask x shape, at sizes where a float64 answer is cheap.

    Sizes sit on, just before and just after the edges of 64-blocks, with grouped heads, Sq != Sk and Dv != D.
    """
    shapes = [
        AttentionShape(2, 4, 129, 64, hkv=2),
        AttentionShape(1, 3, 63, 40, sk=190, dv=72),
        AttentionShape(2, 2, 320, 128),
        AttentionShape(1, 2, 200, 64, sk=65),
        AttentionShape(3, 4, 1, 64, hkv=1, sk=257),
    ]
    row_shapes = [(7, 1000), (33, 257), (5, 4096)]
    dtypes = ("fp32", "bf16", "fp16")
    masks = VERIFY_MASKS
    if quick:
        shapes, row_shapes, dtypes = shapes[:2], row_shapes[:1], dtypes[:2]
        masks = ("none", "causal", "padding50", "window16", "documents3", "blocks25")
    rows = []
    for dtype in dtypes:
        for shape in shapes:
            for mask in masks:
                rows.append(_attention("verify", dtype, shape, mask, quick=quick))
        first = shapes[0]
        for mask in ("causal", "blocks25"):
            for spelling in ("object", "bool", "additive", "prepared"):
                rows.append(_attention("verify", dtype, first, mask, spelling=spelling, quick=quick))
        for feature in ("bias-full", "bias-row", "alibi", "softcap", "sinks", "dropout"):
            rows.append(_attention("verify", dtype, first, "causal", features=(feature,), quick=quick))
        for shape in shapes[: 1 if quick else 2]:
            for mask in ("none", "causal", "padding50", "blocks25"):
                rows.append(_attention("verify", dtype, shape, mask, training=True, quick=quick))
        for op in ROW_TRAFFIC:
            rows += [_rows("verify", op, dtype, shape, quick=quick) for shape in row_shapes]
            rows.append(_rows("verify", op, dtype, row_shapes[0], training=True, quick=quick))
    return list(dict.fromkeys(rows))
