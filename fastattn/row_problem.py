"""One call of softmax or a norm, validated: the row functions' counterpart of `problem.py`.

An error is raised before any work is done and names the argument, what was given and what is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .problem import DTYPES, check_backend, layout_of, name_of


@dataclass(eq=False)
class RowProblem:
    """A validated call. op: "softmax", "layer_norm", "rms_norm", "add_layer_norm" or "add_rms_norm".

    dim, dtype, mask, scale and causal are softmax's, dim not negative. normalized_shape, weight, eps, weight_offset,
    residual and sum_dtype are the norms'. `notes` tells explain what was copied or cast.
    """

    op: str
    x: Tensor
    backend: str | None
    bias: Tensor | None = None
    dim: int = -1
    dtype: torch.dtype | None = None
    mask: Tensor | None = None
    scale: float | None = None
    causal: bool = False
    normalized_shape: tuple[int, ...] = ()
    weight: Tensor | None = None
    eps: float = 0.0
    weight_offset: float = 0.0
    residual: Tensor | None = None
    sum_dtype: torch.dtype | None = None
    out: Tensor | None = None
    sum_out: Tensor | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def rms(self) -> bool:
        return self.op.endswith("rms_norm")

    def tensors(self) -> dict[str, Tensor]:
        """The inputs that may carry a gradient, by name."""
        given = {"x": self.x, "residual": self.residual, "weight": self.weight, "bias": self.bias}
        return {name: t for name, t in given.items() if t is not None}

    def needs_grad(self) -> bool:
        return torch.is_grad_enabled() and any(t.requires_grad for t in self.tensors().values())

    def has_tangents(self) -> bool:
        """Forward-mode AD: a custom op would silently return zero tangents."""
        if torch.compiler.is_compiling() or forward_ad._current_level < 0:
            return False
        return any(forward_ad.unpack_dual(t).tangent is not None for t in self.tensors().values())

    def is_transformed(self) -> bool:
        """Under vmap, grad, vjp or jvp of torch.func."""
        return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def _given(x) -> str:
    return f"{name_of(x.dtype)} {list(x.shape)}" if isinstance(x, Tensor) else f"{type(x).__name__} {x!r:.60}"


def _check_tensor(t, name: str, dtypes: Sequence[torch.dtype] = DTYPES) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.is_nested or t.layout != torch.strided:
        raise TypeError(f"{name} must be a strided tensor, got {layout_of(t)}")
    if t.dtype not in dtypes:
        allowed = ", ".join(name_of(d) for d in dtypes)
        raise TypeError(f"{name} must be one of {allowed}, got {name_of(t.dtype)}")


def _check_device(p: RowProblem, **tensors) -> None:
    for name, t in tensors.items():
        if t is not None and t.device != p.device:
            raise ValueError(f"{name} must be on {p.device} like x, got {t.device}")


def _number(value, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r:.60}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def _byte_range(t: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def _check_out(p: RowProblem, out, name: str, dtype: torch.dtype, others: dict[str, Tensor | None]) -> None:
    """out= of the right shape, dtype and device, over no other tensor except, element for element, x or residual."""
    if out is None:
        return
    if not isinstance(out, Tensor) or out.shape != p.x.shape or out.dtype != dtype or out.device != p.device:
        where = f" on {out.device}" if isinstance(out, Tensor) else ""
        raise ValueError(
            f"{name} must be a tensor {list(p.x.shape)} of {name_of(dtype)} on {p.device}, got {_given(out)}{where}"
        )
    if p.needs_grad() or (out.requires_grad and torch.is_grad_enabled()):
        raise RuntimeError(
            f"{name}= does not support automatic differentiation, but an argument requires grad"
        )
    if torch.compiler.is_compiling() or out.is_meta or out.numel() == 0:
        return
    if any(stride == 0 and size > 1 for size, stride in zip(out.shape, out.stride())):
        raise ValueError(f"{name} must not be expanded: several of its elements share memory")
    begin, end = _byte_range(out)
    for other, t in others.items():
        if t is None or t.numel() == 0:
            continue
        may_be = other in ("x", "residual")
        if may_be and t.data_ptr() == begin and t.dtype == out.dtype and t.stride() == out.stride():
            continue
        first, last = _byte_range(t)
        if first < end and begin < last:
            raise ValueError(
                f"{name} must not share memory with {other}" + (" unless it is all of it" if may_be else "")
            )


def _cuda_autocast(x) -> bool:
    """torch's rule: CUDA autocast runs softmax and the norms in float32, the CPU's leaves them as they are."""
    return isinstance(x, Tensor) and x.device.type == "cuda" and torch.is_autocast_enabled("cuda")


def _float32(t):
    return t.float() if isinstance(t, Tensor) and t.dtype in (torch.float16, torch.bfloat16) else t


def softmax_problem(
    x,
    dim=-1,
    dtype=None,
    *,
    mask=None,
    bias=None,
    scale=None,
    causal=False,
    out=None,
    backend=None,
) -> RowProblem:
    """Validates a call of `softmax`: TypeError for wrong types and dtypes, ValueError for shapes and values."""
    notes: list[str] = []
    check_backend(backend)
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"dtype must be None or one of {', '.join(map(name_of, DTYPES))}, got {dtype!r}")
    if dtype is None and _cuda_autocast(x):
        dtype = torch.float32
        notes.append("autocast: the softmax is computed and returned in float32")
    if isinstance(x, Tensor) and dtype is not None and not x.is_complex():
        # Half precision to float32 is exact, so a kernel reads it as it is.
        fused = dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)
        x = x if fused else x.to(dtype)
    _check_tensor(x, "x")
    rank = max(x.dim(), 1)
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be an int, got {type(dim).__name__} {dim!r:.60}")
    if not -rank <= dim < rank:
        raise IndexError(f"dim must be in [{-rank}, {rank - 1}] for x of shape {list(x.shape)}, got {dim}")
    p = RowProblem(
        "softmax", x, backend, dim=dim % rank, dtype=dtype or x.dtype, causal=bool(causal), notes=notes
    )
    if causal and (x.dim() < 2 or p.dim != x.dim() - 1):
        raise ValueError(
            f"causal=True needs dim to be the last of two or more dimensions, got dim={dim} of shape {list(x.shape)}"
        )
    p.scale = None if scale is None else _number(scale, "scale")
    for name, t in (("mask", mask), ("bias", bias)):
        if t is None:
            continue
        _check_tensor(
            t,
            name,
            (torch.bool,) if name == "mask" else tuple(dict.fromkeys((p.x.dtype, p.dtype, torch.float32))),
        )
        fits = t.dim() <= x.dim() and all(a in (1, b) for a, b in zip(reversed(t.shape), reversed(x.shape)))
        if not fits:
            raise ValueError(f"{name} must broadcast to the shape of x, {list(x.shape)}, got {list(t.shape)}")
    p.mask, p.bias, p.out = mask, bias, out
    _check_device(p, mask=mask, bias=bias)
    _check_out(p, out, "out", p.dtype, {"x": x, "mask": mask, "bias": bias})
    return p


def norm_problem(
    op,
    x,
    normalized_shape,
    weight=None,
    bias=None,
    eps=1e-5,
    *,
    residual=None,
    weight_offset=0.0,
    sum_dtype=None,
    out=None,
    sum_out=None,
    backend=None,
) -> RowProblem:
    """Validates a call of a norm: TypeError for wrong types and dtypes, ValueError for wrong shapes and values."""
    notes: list[str] = []
    check_backend(backend)
    if _cuda_autocast(x):
        x, weight, bias, residual = (_float32(t) for t in (x, weight, bias, residual))
        notes.append("autocast: the norm is computed and returned in float32")
    _check_tensor(x, "x")
    shape = (normalized_shape,) if isinstance(normalized_shape, (int, torch.SymInt)) else normalized_shape
    if not isinstance(shape, Sequence) or not all(isinstance(size, (int, torch.SymInt)) for size in shape):
        raise TypeError(
            f"normalized_shape must be an int or a sequence of ints, got {normalized_shape!r:.60}"
        )
    shape = tuple(shape)
    if not shape or len(shape) > x.dim() or tuple(x.shape[-len(shape) :]) != shape:
        raise ValueError(
            f"normalized_shape must be how the shape of x ends, {list(x.shape)}, in one or more dimensions, got "
            f"{list(shape)}"
        )
    p = RowProblem(
        op, x, backend, bias, normalized_shape=shape, weight=weight, residual=residual, notes=notes
    )
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        _check_tensor(t, name)
        if tuple(t.shape) != shape:
            raise ValueError(
                f"{name} must have the shape of normalized_shape, {list(shape)}, got {list(t.shape)}"
            )
    if eps is None and p.rms:
        eps = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    p.eps = _number(eps, "eps")
    if p.eps < 0:
        raise ValueError(f"eps must be 0 or more, got {eps}")
    p.weight_offset = _number(weight_offset, "weight_offset")
    p.out, p.sum_out = out, sum_out
    if op.startswith("add_"):
        _check_tensor(residual, "residual")
        if residual.shape != x.shape:
            raise ValueError(
                f"residual must have the shape of x, {list(x.shape)}, got {list(residual.shape)}"
            )
        if sum_dtype is not None and sum_dtype not in DTYPES:
            raise TypeError(
                f"sum_dtype must be None or one of {', '.join(map(name_of, DTYPES))}, got {sum_dtype!r}"
            )
        p.sum_dtype = residual.dtype if sum_dtype is None else sum_dtype
    _check_device(p, weight=weight, bias=bias, residual=residual)
    inputs = {"x": x, "residual": residual, "weight": weight, "bias": bias}
    _check_out(
        p, out, "out", x.dtype, {**inputs, "sum_out": sum_out if isinstance(sum_out, Tensor) else None}
    )
    _check_out(p, sum_out, "sum_out", p.sum_dtype, inputs)
    return p
