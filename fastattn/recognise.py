"""Which norm a module computes, found out by running it: `recognise`.

Model libraries write RMSNorm again in every model, under many names, with the weight used as w or as 1 + w, eps
under three names, and their own rules for mixed dtypes. A name tells none of this, and a class of the same name
may compute something else. So a copy of the instance is run on inputs that tell the formulas apart, forward and
backward, and compared with each candidate in float64.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# A copy's eps is set to this to see whether the module follows; far from any eps in use.
_OTHER_EPS = 3e-3
_RELATIVE, _ABSOLUTE = 1e-4, 1e-5


@dataclass(frozen=True)
class Norm:
    """A recognised norm over the last dimension.

    kind: "rms_norm" or "layer_norm". eps_name: the attribute that holds eps. weight_offset: what is added to the
    weight. input_name: the parameter of forward. follows_weight: where the dtypes of x and weight differ, whether
    the result has the weight's dtype, for (a narrower x, a wider x); else it has that of x.
    """

    kind: str
    eps_name: str
    weight_offset: float
    input_name: str
    follows_weight: tuple[bool, bool] = (False, False)

    def __str__(self) -> str:
        return self.kind + (f", weight + {self.weight_offset:g}" if self.weight_offset else "")


def is_candidate(module: nn.Module) -> bool:
    """Whether a module has the build of a norm: a leaf with at most a 1-D weight and bias, and an eps."""
    children = {name for name, _ in module.named_children()} - {"parametrizations"}
    if type(module).__module__.startswith("torch.nn.modules.") or children:
        return False
    parameters = dict(module.named_parameters(recurse=False))
    if not set(parameters) <= {"weight", "bias"} or next(module.buffers(recurse=False), None) is not None:
        return False
    if not ("weight" in parameters or "norm" in type(module).__name__.lower()):
        return False
    shapes = {tuple(p.shape) for p in parameters.values()}
    return len(shapes) <= 1 and all(len(shape) == 1 for shape in shapes) and any(_eps_names(module))


def _eps_names(module: nn.Module) -> Iterator[str]:
    for name, value in vars(module).items():
        if isinstance(value, float) and 0 < value < 0.01:
            yield name


def _input_name(module: nn.Module) -> str | None:
    """The name of forward's only parameter."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    if len(parameters) != 1 or parameters[0].kind in (
        inspect.Parameter.VAR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
    ):
        return None
    return parameters[0].name


def _formula(
    kind: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, offset: float, eps: float
) -> Tensor:
    """The candidate in x's dtype; x [..., n], weight and bias [n]."""
    if kind == "layer_norm":
        x = x - x.mean(-1, keepdim=True)
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (weight + offset)
    return y if bias is None else y + bias


def _inputs(n: int) -> tuple[Tensor, Tensor]:
    """float32 [2, 4, n] with rows from far below any eps to far above, one of them off zero; and a dy."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, n, generator=generator)
    scale = torch.tensor([1e-4, 1e-3, 1e-2, 0.1, 1.0, 1.0, 30.0, 0.0])
    x = x * scale[:, None]
    x[5] += 3.0
    return x.view(2, 4, n), torch.randn(2, 4, n, generator=generator)


def _run(module: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """The result and the gradients of x and the parameters."""
    x = x.detach().requires_grad_()
    y = module(x)
    given = (x, *module.parameters())
    return (y, *torch.autograd.grad(y, given, dy.to(y.dtype), allow_unused=True))


def _expected(norm: Norm, module: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    x = x.double().requires_grad_()
    parameters = {name: p.detach().double().requires_grad_() for name, p in module.named_parameters()}
    eps = getattr(module, norm.eps_name)
    y = _formula(norm.kind, x, parameters.get("weight"), parameters.get("bias"), norm.weight_offset, eps)
    return (y, *torch.autograd.grad(y, (x, *parameters.values()), dy.double()))


def _agrees(norm: Norm, module: nn.Module, x: Tensor, dy: Tensor) -> bool:
    actual, expected = _run(module, x, dy), _expected(norm, module, x, dy)
    for a, e in zip(actual, expected):
        if a is None or a.shape != e.shape:
            return False
        # Gradients of x grow as 1 / sqrt(eps) in the smallest rows: the bound follows each row.
        bound = _RELATIVE * e.abs().amax(-1, keepdim=True) + _ABSOLUTE
        if not ((a.double() - e).abs() <= bound).all():
            return False
    return True


def _candidates(module: nn.Module, input_name: str) -> Iterator[Norm]:
    weighted = getattr(module, "weight", None) is not None
    for kind in ("rms_norm", "layer_norm"):
        for offset in (0.0, 1.0) if weighted else (0.0,):
            for eps_name in _eps_names(module):
                yield Norm(kind, eps_name, offset, input_name)


def _mixed(module: nn.Module, x: Tensor) -> torch.dtype:
    """The dtype of a result; x's, where the module refuses the mix of dtypes, as torch's layer_norm does."""
    try:
        return module(x).dtype
    except RuntimeError:
        return x.dtype


def _dtype_rules(module: nn.Module, x: Tensor) -> tuple[bool, bool] | None:
    """`follows_weight`; None where the module's dtypes follow neither x nor the weight."""
    half = copy.deepcopy(module).to(torch.bfloat16)
    with torch.no_grad():
        if half(x.bfloat16()).dtype != torch.bfloat16:
            return None
        if next(module.parameters(), None) is None:
            return False, False
        narrow, wide = _mixed(module, x.bfloat16()), _mixed(half, x)
    if not {narrow, wide} <= {torch.bfloat16, torch.float32}:
        return None
    return narrow == torch.float32, wide == torch.bfloat16


def recognise(module: nn.Module) -> Norm | str:
    """What a candidate (see `is_candidate`) computes, or in words why it is not replaced.

    The instance itself is not run: a float32 copy on the CPU with random weights is, in training and in
    evaluation, with its own eps and with another one. A module on the meta device will do.
    """
    input_name = _input_name(module)
    if input_name is None:
        return f"its forward takes {inspect.signature(module.forward)}, not one tensor"
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            return _recognise(copy.deepcopy(module).to_empty(device="cpu").float(), input_name)
    except Exception as error:
        return f"it cannot be run on a probe input: {type(error).__name__}: {str(error)[:80]}"


def _recognise(probe: nn.Module, input_name: str) -> Norm | str:
    generator = torch.Generator().manual_seed(1)
    n = 16
    for p in probe.parameters():
        n = p.shape[0]
        p.requires_grad_()
        with torch.no_grad():
            p.copy_(torch.randn(n, generator=generator))
    x, dy = _inputs(n)
    for norm in _candidates(probe, input_name):
        own_eps = getattr(probe, norm.eps_name)
        matches = True
        for eps in (own_eps, _OTHER_EPS):
            setattr(probe, norm.eps_name, eps)
            for training in (False, True):
                probe.train(training)
                matches = matches and _agrees(norm, probe, x, dy)
        setattr(probe, norm.eps_name, own_eps)
        if not matches or not _agrees(norm, probe, x.view(8, n), dy.view(8, n)):
            continue
        rules = _dtype_rules(probe, x)
        if rules is None:
            return "its result has neither the dtype of its input nor of its weight"
        return Norm(norm.kind, norm.eps_name, norm.weight_offset, input_name, rules)
    return "run on a probe input, it computes neither RMSNorm nor LayerNorm"
