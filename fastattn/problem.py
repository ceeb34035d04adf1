"""One call, validated: shapes, dtypes and features. Every error message about arguments lives here.

Nothing below this file checks arguments for people again; an error is raised before any work is done and names
the argument, what was given and what is allowed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .masks import Mask, Prepared, waits
from .masks.ranges import Shape

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = ("cpu", "triton", "cuda", "reference")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def new_seed(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """A seed of dropout, for calls that share one too: where the operands are."""
    return torch.randint(-(2**63), 2**63 - 1, (), generator=generator, device=device)


def layout_of(t: Tensor) -> str:
    """A tensor that is not strided, in words; nested ones say that they are."""
    return "a nested tensor" if t.is_nested else f"layout {t.layout}"


@dataclass(eq=False)
class Problem:
    """An attention call in canonical form: q [B, Hq, Sq, D], k [B, Hkv, Sk, D], v [B, Hkv, Sk, Dv].

    `lead` is the shape of the leading dimensions as the caller had them, so that results go back in their rank.
    `mask` and `bias` are as given, in the canonical rank. `notes` tells explain what was copied or cast.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lead: tuple[int, ...]
    mask: Mask | Prepared | Tensor | None = None
    is_causal: bool = False
    bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    scale: float = 1.0
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None
    generator: torch.Generator | None = None
    return_lse: bool = False
    return_weights: bool = False
    backend: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def B(self) -> int:
        return self.q.shape[0]

    @property
    def Hq(self) -> int:
        return self.q.shape[1]

    @property
    def Hkv(self) -> int:
        return self.k.shape[1]

    @property
    def Sq(self) -> int:
        return self.q.shape[2]

    @property
    def Sk(self) -> int:
        return self.k.shape[2]

    @property
    def D(self) -> int:
        return self.q.shape[3]

    @property
    def Dv(self) -> int:
        return self.v.shape[3]

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def dtype(self) -> torch.dtype:
        return self.q.dtype

    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor that may carry a gradient."""
        mask = self.mask if isinstance(self.mask, Tensor) and self.mask.is_floating_point() else None
        given = (self.q, self.k, self.v, self.bias, mask, self.alibi_slopes, self.sinks)
        return tuple(t for t in given if t is not None)

    def needs_grad(self) -> bool:
        return torch.is_grad_enabled() and any(t.requires_grad for t in self.tensors())

    def has_tangents(self) -> bool:
        """Forward-mode AD: a custom op would silently return zero tangents."""
        if torch.compiler.is_compiling() or forward_ad._current_level < 0:
            return False
        return any(forward_ad.unpack_dual(t).tangent is not None for t in self.tensors())

    def draw_seed(self) -> None:
        """Draws dropout's seed unless one was given: after all that can refuse the call, which then draws nothing."""
        if self.dropout_p and self.dropout_seed is None:
            self.dropout_seed = new_seed(self.device, self.generator)

    def restore(self, t: Tensor, *trailing: int) -> Tensor:
        """A canonical result [B, Hq, ...] in the caller's rank."""
        return t if len(self.lead) == 2 else t.reshape(*self.lead, *trailing)


def _kind(x) -> str:
    return f"a tensor of shape {list(x.shape)}" if isinstance(x, Tensor) else f"{type(x).__name__} {x!r:.60}"


def _check_operands(q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str, str]) -> None:
    for name, t in zip(names, (q, k, v)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if t.is_nested or t.layout != torch.strided:
            raise TypeError(
                f"{name} must be a strided tensor, got {layout_of(t)}; pack sequences of different lengths "
                "into one and pass fastattn.masks.Documents"
            )
        if t.dim() < 2:
            raise ValueError(f"{name} must have at least 2 dimensions [..., S, D], got shape {list(t.shape)}")
        if t.dtype not in DTYPES:
            allowed = ", ".join(name_of(d) for d in DTYPES)
            raise TypeError(f"{name} must be one of {allowed}, got {name_of(t.dtype)}")
    dtypes = {t.dtype for t in (q, k, v)}
    if len(dtypes) > 1:
        given = ", ".join(f"{n} {name_of(t.dtype)}" for n, t in zip(names, (q, k, v)))
        raise TypeError(f"{', '.join(names)} must have one dtype, got {given}")
    if not q.device == k.device == v.device:
        given = ", ".join(f"{n} on {t.device}" for n, t in zip(names, (q, k, v)))
        raise ValueError(f"{', '.join(names)} must be on one device, got {given}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"{names[0]} and {names[1]} must have the same last dimension, got {q.shape[-1]} and {k.shape[-1]}"
        )
    if k.shape[-2] != v.shape[-2]:
        raise ValueError(
            f"{names[1]} and {names[2]} must have the same number of rows, got {k.shape[-2]} and {v.shape[-2]}"
        )


def _canonical(q, k, v, gqa: bool, names) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """Leading dimensions broadcast and folded to [B, H]; K and V keep their own number of heads."""
    if q.dim() == k.dim() == v.dim() == 4 and q.shape[0] == k.shape[0] == v.shape[0]:
        Hq, Hkv = q.shape[1], k.shape[1]
        if v.shape[1] == Hkv and (Hq == Hkv or (gqa and Hkv > 0 and Hq % Hkv == 0)):
            return q, k, v, tuple(q.shape[:2])
    if max(q.dim(), k.dim(), v.dim()) <= 3:
        heads = (1, 1, 1)
    else:
        heads = tuple(t.shape[-3] if t.dim() > 2 else 1 for t in (q, k, v))
    Hq, Hk, Hv = heads
    if Hk != Hv and 1 not in (Hk, Hv):
        raise ValueError(f"{names[1]} and {names[2]} must have the same number of heads, got {Hk} and {Hv}")
    Hkv = max(Hk, Hv) if 0 not in (Hk, Hv) else 0
    if Hq != Hkv and (Hkv == 0 or Hq % Hkv or not (gqa or Hkv == 1)):
        if Hq == 1 and Hkv > 1 and not gqa:
            Hq = Hkv  # q broadcasts over the heads of k
        else:
            hint = "" if gqa else "; equal numbers, or enable_gqa=True with a multiple"
            raise ValueError(
                f"the heads of {names[0]} ({Hq}) must be a multiple of the heads of {names[1]} ({Hkv}){hint}"
            )
    folded = max(q.dim(), k.dim(), v.dim()) > 3
    batches = [t.shape[:-3] if folded else t.shape[:-2] for t in (q, k, v)]
    try:
        batch = tuple(torch.broadcast_shapes(*batches))
    except RuntimeError:
        given = ", ".join(str(list(t.shape)) for t in (q, k, v))
        raise ValueError(
            f"the leading dimensions of {', '.join(names)} do not broadcast: shapes {given}"
        ) from None
    B = math.prod(batch)

    def fold(t: Tensor, heads: int) -> Tensor:
        if folded and t.dim() == 2:
            t = t.unsqueeze(0)
        if not folded:
            t = t.unsqueeze(-3)
        return t.expand(*batch, heads, *t.shape[-2:]).reshape(B, heads, *t.shape[-2:])

    lead = (*batch, Hq) if folded else batch
    return fold(q, Hq), fold(k, Hkv), fold(v, Hkv), lead


def _canonical_score_tensor(t: Tensor, name: str, p: Problem) -> Tensor:
    """A mask or bias right-aligned to [*lead, Sq, Sk], as [B or 1, Hq or 1, Sq or 1, Sk or 1]."""
    want = (*p.lead, p.Sq, p.Sk)
    if t.dim() < 2 or t.dim() > len(want):
        raise ValueError(
            f"{name} must have 2 to {max(len(want), 2)} dimensions and broadcast to {list(want)}, got shape "
            f"{list(t.shape)}"
        )
    for got, full in zip(reversed(t.shape), reversed(want)):
        if got not in (1, full):
            raise ValueError(
                f"{name} of shape {list(t.shape)} does not broadcast to {list(want)}"
                + (
                    "; three dimensions are read as [H, Sq, Sk], for one mask a batch item pass [B, 1, Sq, Sk]"
                    if t.dim() == 3 and len(want) == 4
                    else ""
                )
            )
    _check_device(t, name, p)
    if len(p.lead) == 2:
        return t[(None,) * (4 - t.dim())]
    if t.dim() == 2:
        return t[None, None]
    if len(p.lead) == 1:
        return t.unsqueeze(1)
    return t.expand(*p.lead, *t.shape[-2:]).reshape(p.B, p.Hq, *t.shape[-2:])


def _check_device(t: Tensor, name: str, p: Problem) -> None:
    if t.device != p.device:
        raise ValueError(f"{name} must be on {p.device} like q, got {t.device}")


def _check_score_dtype(t: Tensor, name: str, p: Problem, boolean: bool) -> None:
    allowed = [*([torch.bool] if boolean else []), p.dtype, torch.float32]
    if t.dtype not in allowed:
        names = " or ".join(dict.fromkeys(name_of(d) for d in allowed))
        raise TypeError(f"{name} must be {names} with q in {name_of(p.dtype)}, got {name_of(t.dtype)}")


def _autocast(tensors: tuple, notes: list[str]) -> tuple:
    """The operands and score tensors as autocast has them: torch's own rule for attention."""
    if not isinstance(tensors[0], Tensor):
        return tensors
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # torch knows no autocast of meta tensors
        return tensors
    dtype = torch.get_autocast_dtype(device)

    def cast(t):
        eligible = isinstance(t, Tensor) and t.is_floating_point() and t.dtype not in (dtype, torch.float64)
        return t.to(dtype) if eligible else t

    notes.append(f"autocast: q, k, v, mask and bias in {name_of(dtype)}")
    return tuple(cast(t) for t in tensors)


def _check_generator(generator, p: Problem) -> torch.Generator | None:
    if generator is None:
        return None
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be None or a torch.Generator, got {_kind(generator)}")
    if generator.device.type != p.device.type:
        raise RuntimeError(f"generator must be on {p.device} like q, got {generator.device}")
    return generator


def _seed(p: Problem, seed) -> Tensor | None:
    """The seed that was given, as a tensor."""
    if seed is None:
        return None
    if p.generator is not None:
        raise ValueError("dropout_seed and generator are both given; one of them decides")
    if isinstance(seed, int):
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"dropout_seed must be an int64, from -2**63 to 2**63 - 1, got {seed}")
        return torch.tensor(seed, dtype=torch.int64, device=p.device) if p.dropout_p else None
    if not isinstance(seed, Tensor):
        raise TypeError(f"dropout_seed must be an int or an int64 tensor, got {type(seed).__name__}")
    if seed.numel() != 1 or seed.dtype != torch.int64 or seed.device != p.device:
        raise ValueError(
            f"dropout_seed must be an int or one int64 on {p.device}, got {list(seed.shape)} {name_of(seed.dtype)} "
            f"on {seed.device}"
        )
    return seed if p.dropout_p else None


def _number(x, name: str) -> float:
    if not isinstance(x, str):  # which float reads too
        try:
            return float(x)
        except (TypeError, ValueError, RuntimeError):
            pass
    raise TypeError(f"{name} must be a number or None, got {_kind(x)}")


def _check_is_causal(is_causal, mask, mask_name: str) -> None:
    if type(is_causal).__name__ not in ("bool", "bool_"):  # numpy's too
        raise TypeError(f"is_causal must be True or False, got {_kind(is_causal)}")
    if is_causal and mask is not None:
        raise ValueError(
            f"{mask_name} is given and is_causal is True; pass one of them, or "
            "fastattn.attention(mask=Causal() & ...)"
        )


def _check_term(t, name: str, p: Problem, shapes: tuple[tuple[int, ...], ...]) -> Tensor:
    """A float a head, or a batch item and head."""
    if not isinstance(t, Tensor) or tuple(t.shape) not in shapes:
        allowed = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name} must be a tensor {allowed}, got {_kind(t)}")
    if not t.is_floating_point():
        raise TypeError(f"{name} must be of floating point, got {name_of(t.dtype)}")
    _check_device(t, name, p)
    return t


def check_dropout(dropout_p: float, name: str = "dropout_p") -> float:
    if not isinstance(dropout_p, (int, float)) or not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {dropout_p!r}")
    return float(dropout_p)


def check_softcap(softcap) -> float | None:
    if softcap is None:
        return None
    cap = _number(softcap, "softcap")
    if not 0 < cap < math.inf:
        raise ValueError(f"softcap must be positive and finite, or None, got {softcap!r}")
    return cap


def check_backend(backend: str | None) -> str | None:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


def attention_problem(
    q,
    k,
    v,
    *,
    mask=None,
    is_causal=False,
    bias=None,
    alibi_slopes=None,
    softcap=None,
    sinks=None,
    scale=None,
    dropout_p=0.0,
    dropout_seed=None,
    generator=None,
    return_lse=False,
    return_weights=False,
    out=None,
    backend=None,
    gqa=True,
    names=("q", "k", "v"),
    mask_name="mask",
) -> Problem:
    """Validates one call of `attention` or `scaled_dot_product_attention`.

    Raises TypeError for wrong types and dtypes, ValueError for wrong shapes and values, each naming the argument.
    """
    check_backend(backend)
    dropout_p = check_dropout(dropout_p)
    _check_is_causal(is_causal, mask, mask_name)
    notes: list[str] = []
    q, k, v, mask, bias = _autocast((q, k, v, mask, bias), notes)
    _check_operands(q, k, v, names)
    q4, k4, v4, lead = _canonical(q, k, v, gqa, names)
    D = q4.shape[3]
    p = Problem(q4, k4, v4, lead, is_causal=is_causal, dropout_p=dropout_p, backend=backend, notes=notes)
    p.return_lse, p.return_weights = return_lse, return_weights
    p.scale = _number(scale, "scale") if scale is not None else (D**-0.5 if D else 1.0)
    p.softcap = check_softcap(softcap)
    if isinstance(mask, Tensor):
        _check_score_dtype(mask, mask_name, p, boolean=True)
        p.mask = _canonical_score_tensor(mask, mask_name, p)
    elif mask is None or isinstance(mask, (Mask, Prepared)):
        p.mask = mask
    else:
        raise TypeError(
            f"{mask_name} must be None, a bool or float tensor or a mask of fastattn.masks, got {_kind(mask)}"
        )
    if waits.transformed():
        _mapped_mask_as_bias(p, mask_name)
    if bias is not None:
        if not isinstance(bias, Tensor):
            raise TypeError(f"bias must be a tensor, got {_kind(bias)}")
        _check_score_dtype(bias, "bias", p, boolean=False)
        bias = _canonical_score_tensor(bias, "bias", p)
        p.bias = bias if p.bias is None else p.bias.float() + bias.float()
    if alibi_slopes is not None:
        p.alibi_slopes = _check_term(alibi_slopes, "alibi_slopes", p, ((p.Hq,), (p.B, p.Hq)))
    if sinks is not None:
        p.sinks = _check_term(sinks, "sinks", p, ((p.Hq,),))
    p.generator = _check_generator(generator, p)
    p.dropout_seed = _seed(p, dropout_seed)
    if out is not None:
        _check_out(out, p)
    return p


def _mapped_mask_as_bias(p: Problem, name: str) -> None:
    """A mask that vmap maps over: nobody can look at it, so it is added to the scores."""
    mask = p.mask
    if isinstance(mask, Mask) and mask._is_mapped():
        mask = mask._formula(Shape(p.B, p.Hq, p.Sq, p.Sk, p.device))
    if not isinstance(mask, Tensor) or not waits.mapped(mask):
        return
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, -math.inf).to(p.dtype)
    p.mask, p.bias = None, mask
    p.notes.append(
        f"vmap maps over {name}: it is added to the scores, 0 and -inf, and no work is left out for it"
    )


def _check_out(out, p: Problem) -> None:
    want = (*p.lead, p.Sq, p.Dv)
    if (
        not isinstance(out, Tensor)
        or tuple(out.shape) != want
        or out.dtype != p.dtype
        or out.device != p.device
    ):
        raise ValueError(
            f"out must be a tensor {list(want)} of {name_of(p.dtype)} on {p.device}, got {_kind(out)}"
            + (f" of {name_of(out.dtype)} on {out.device}" if isinstance(out, Tensor) else "")
        )
    if p.needs_grad() or out.requires_grad:
        raise RuntimeError("out= does not support automatic differentiation, but an argument requires grad")
    if torch.compiler.is_compiling() or out.is_meta:
        return
    mine = out.untyped_storage().data_ptr()
    for name, t in (("q", p.q), ("k", p.k), ("v", p.v), ("bias", p.bias)):
        if t is not None and t.numel() and t.untyped_storage().data_ptr() == mine:
            raise ValueError(f"out must not share memory with {name}")
