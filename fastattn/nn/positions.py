"""Positions: sinusoids, rotations, T5's learned bias and ALiBi's slopes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def inverse_frequencies(dim: int, base: float) -> Tensor:
    """base^(-2 i / dim) for i below dim / 2, float32."""
    return base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim).float()


def sinusoid(positions: Tensor, dim: int, base: float = 10000.0, interleaved: bool = True) -> Tensor:
    """[*positions.shape, dim], float32: sine and cosine of position times each inverse frequency.

    interleaved: sin, cos, sin, cos, ... (arXiv:1706.03762); else all sines, then all cosines (arXiv:1901.02860).
    """
    angles = positions.float().unsqueeze(-1) * inverse_frequencies(dim, base).to(positions.device)
    parts = (angles.sin(), angles.cos())
    return torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)


def positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
    return value


def check_even(name: str, size: int) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or size < 2 or size % 2:
        raise ValueError(f"{name} must be an even int of at least 2, got {size!r}")
    return size


def check_base(base: float) -> float:
    if not base > 0:
        raise ValueError(f"base must be positive, got {base!r}")
    return base


class SinusoidalPositionalEncoding(torch.nn.Module):
    """Adds sinusoids of the position (arXiv:1706.03762, section 3.5): ``dropout(x + encoding)``.

    Args:
        d_model: the width, even.
        dropout: of the sum, in training.
        base: of the geometric progression of wavelengths.
        interleaved: sine and cosine in turn; False puts all sines before all cosines.
        batch_first: x is [N, S, d_model]; else [S, N, d_model]. [S, d_model] goes with both.

    forward(x, positions=None): positions, integer [S] or [N, S], by default 0..S - 1. Any float dtype; angles are
    float32. There is no longest sequence and no parameter.

    Raises:
        ValueError: d_model is odd, base not positive, or x or positions have another size.
    """

    def __init__(
        self,
        d_model: int,
        dropout: float = 0.0,
        base: float = 10000.0,
        interleaved: bool = True,
        batch_first: bool = True,
    ) -> None:
        super().__init__()
        self.d_model = check_even("d_model", d_model)
        self.base = check_base(base)
        self.interleaved = interleaved
        self.batch_first = batch_first
        self.dropout = torch.nn.Dropout(dropout)

    def encoding(self, positions: Tensor) -> Tensor:
        """float32 [*positions.shape, d_model]."""
        return sinusoid(positions, self.d_model, self.base, self.interleaved)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        if x.dim() not in (2, 3) or x.shape[-1] != self.d_model:
            raise ValueError(f"x must be [N, S, {self.d_model}] or [S, {self.d_model}], got {list(x.shape)}")
        sequence = 1 if x.dim() == 3 and self.batch_first else 0
        if positions is None:
            positions = torch.arange(x.shape[sequence], device=x.device)
        elif positions.dim() not in (1, 2) or positions.shape[-1] != x.shape[sequence]:
            raise ValueError(
                f"positions must be [{x.shape[sequence]}] or [N, {x.shape[sequence]}] like the tokens of x, got "
                f"{list(positions.shape)}"
            )
        encoding = self.encoding(positions).to(x.dtype)
        if x.dim() == 3 and not self.batch_first:
            encoding = encoding.transpose(0, 1) if encoding.dim() == 3 else encoding.unsqueeze(1)
        return self.dropout(x + encoding)

    def extra_repr(self) -> str:
        return f"{self.d_model}, base={self.base}, interleaved={self.interleaved}, batch_first={self.batch_first}"


class RotaryEmbedding(torch.nn.Module):
    """Rotates pairs of q's and k's elements by an angle that grows with the position (RoPE, arXiv:2104.09864).

    Args:
        dim: how many elements of a head are rotated, even; the first ones. Others pass through.
        base: of the geometric progression of angles.
        layout: which elements are a pair: "half" (i, i + dim / 2), as Llama; "interleaved" (2 i, 2 i + 1), as GPT-J.
        scaling: how angles change for sequences longer than those trained on, a dict with "type" and numbers:
            {"type": "linear", "factor": f}: positions / f (arXiv:2306.15595).
            {"type": "ntk", "factor": f}: base * f^(dim / (dim - 2)).
            {"type": "llama3", "factor", "low_freq_factor", "high_freq_factor", "original_length"}: Llama 3.1's.
            {"type": "yarn", "factor", "original_length"}, with "beta_fast" (32) and "beta_slow" (1), arXiv:2309.00071;
            it also scales q and k by 0.1 ln(factor) + 1.

    forward(x, positions=None): x [..., S, D], D >= dim, any float dtype (angles are float32); positions integer [S], or
    [N, S] with x [N, H, S, D]; by default 0..S - 1. Returns x rotated.

    Raises:
        ValueError: an odd dim, an unknown layout, a scaling with missing or unknown entries.
    """

    _NEEDED = {
        "linear": ("factor",),
        "ntk": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_length"),
        "yarn": ("factor", "original_length"),
    }
    _OPTIONAL = {"yarn": ("beta_fast", "beta_slow")}

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        layout: str = "half",
        scaling: Mapping | None = None,
        device=None,
    ) -> None:
        super().__init__()
        self.dim = check_even("dim", dim)
        if layout not in ("half", "interleaved"):
            raise ValueError(f"layout must be 'half' or 'interleaved', got {layout!r}")
        self.base, self.layout = check_base(base), layout
        self.scaling = None if scaling is None else dict(scaling)
        self.magnitude = 1.0
        self.register_buffer("inverse_frequencies", self._frequencies().to(device), persistent=False)

    def _frequencies(self) -> Tensor:
        plain = inverse_frequencies(self.dim, self.base)
        if self.scaling is None:
            return plain
        s = self.scaling
        kind = s.get("type")
        if kind not in self._NEEDED:
            raise ValueError(f"scaling['type'] must be one of {', '.join(self._NEEDED)}, got {kind!r}")
        allowed = {"type", *self._NEEDED[kind], *self._OPTIONAL.get(kind, ())}
        wrong = [n for n in self._NEEDED[kind] if n not in s] + [n for n in s if n not in allowed]
        if wrong:
            raise ValueError(
                f"scaling of type {kind!r} needs {', '.join(self._NEEDED[kind])}; wrong: {', '.join(wrong)}"
            )
        for name in self._NEEDED[kind]:
            if not s[name] > 0:
                raise ValueError(f"scaling[{name!r}] must be positive, got {s[name]!r}")
        if kind == "linear":
            return plain / s["factor"]
        if kind == "ntk":
            if self.dim == 2:
                raise ValueError(
                    "scaling of type 'ntk' leaves the only angle of dim=2 as it is; dim must be 4 or more"
                )
            return inverse_frequencies(self.dim, self.base * s["factor"] ** (self.dim / (self.dim - 2)))
        if kind == "llama3":
            turns = s["original_length"] * plain / (2 * math.pi)
            low, high = s["low_freq_factor"], s["high_freq_factor"]
            if not low < high:
                raise ValueError(f"low_freq_factor must be below high_freq_factor, got {low} and {high}")
            keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        else:
            self.magnitude = 0.1 * math.log(s["factor"]) + 1.0
            low, high = (
                self.dim * math.log(s["original_length"] / (turns * 2 * math.pi)) / (2 * math.log(self.base))
                for turns in (s.get("beta_fast", 32.0), s.get("beta_slow", 1.0))
            )
            low, high = max(math.floor(low), 0), min(math.ceil(high), self.dim - 1)
            keep = 1.0 - ((torch.arange(self.dim // 2) - low) / max(high - low, 1e-3)).clamp(0.0, 1.0)
        return keep * plain + (1.0 - keep) * plain / s["factor"]

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        if x.dim() < 2 or x.shape[-1] < self.dim:
            raise ValueError(f"x must be [..., S, D] with D of at least {self.dim}, got {list(x.shape)}")
        if positions is None:
            positions = torch.arange(x.shape[-2], device=x.device)
        elif positions.dim() not in (1, 2) or positions.shape[-1] != x.shape[-2]:
            raise ValueError(
                f"positions must be [{x.shape[-2]}] or [N, {x.shape[-2]}] like the rows of x, got "
                f"{list(positions.shape)}"
            )
        angles = positions.float().unsqueeze(-1) * self.inverse_frequencies
        if angles.dim() == 3:
            angles = angles.unsqueeze(1)  # [N, 1, S, dim / 2]: the same for all heads
        work = torch.promote_types(x.dtype, torch.float32)
        angles = angles.to(work)
        cos, sin = angles.cos() * self.magnitude, angles.sin() * self.magnitude
        turned, rest = x[..., : self.dim].to(work), x[..., self.dim :]
        if self.layout == "half":
            a, b = turned.chunk(2, -1)
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        else:
            a, b = turned[..., 0::2], turned[..., 1::2]
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        turned = turned.to(x.dtype)
        return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), -1)

    def extra_repr(self) -> str:
        scaling = "" if self.scaling is None else f", scaling={self.scaling}"
        return f"{self.dim}, base={self.base}, layout={self.layout!r}{scaling}"


def by_distance(values: Tensor, Sq: int, Sk: int) -> Tensor:
    """[*, Sq, Sk] whose entry (i, j) is values[..., j - i + Sq - 1]; values is [*, Sq + Sk - 1]."""
    if Sq < 1 or Sk < 1:
        raise ValueError(f"Sq and Sk must be at least 1, got {Sq} and {Sk}")
    return values.unfold(-1, Sk, 1).flip(-2)


class T5RelativeBias(torch.nn.Module):
    """A learned bias a head and bucket of distances j - i (T5, arXiv:1910.10683): exact ones near, logarithmic far.

    Args:
        num_heads: heads of the attention.
        num_buckets: how many; half of them for keys after the row where bidirectional.
        max_distance: from here on all distances share the last bucket.
        bidirectional: False, in decoders, puts every later key into bucket 0.

    Parameter: `relative_attention_bias.weight` [num_buckets, num_heads], as transformers' T5.

    forward(Sq, Sk, offset=0): float [1, num_heads, Sq, Sk], the `bias` of `fastattn.attention` (T5 has scale=1 there);
    `offset` is the position of the first row.
    """

    def __init__(
        self,
        num_heads: int,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        positive("num_heads", num_heads)
        exact = num_buckets // (4 if bidirectional else 2)
        if exact < 1 or num_buckets % 2:
            raise ValueError(
                f"num_buckets must be even and at least {4 if bidirectional else 2}, got {num_buckets}"
            )
        if max_distance <= exact:
            raise ValueError(
                f"max_distance must exceed the {exact} distances that num_buckets={num_buckets} keeps exact, got "
                f"{max_distance}"
            )
        self.num_heads, self.num_buckets = num_heads, num_buckets
        self.max_distance, self.bidirectional = max_distance, bidirectional
        self.relative_attention_bias = torch.nn.Embedding(num_buckets, num_heads, device=device, dtype=dtype)

    def buckets(self, distance: Tensor) -> Tensor:
        """The bucket of each distance j - i, int64."""
        count, base = self.num_buckets, 0
        if self.bidirectional:
            count //= 2
            base = (distance > 0).long() * count
            distance = distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        exact = count // 2
        ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (ratio * (count - exact)).long()).clamp(max=count - 1)
        return base + torch.where(distance < exact, distance, far)

    def forward(self, Sq: int, Sk: int, offset: int = 0) -> Tensor:
        device = self.relative_attention_bias.weight.device
        distance = torch.arange(1 - Sq - offset, Sk - offset, device=device)
        values = self.relative_attention_bias(self.buckets(distance))
        return by_distance(values.t(), Sq, Sk).unsqueeze(0)

    def extra_repr(self) -> str:
        return f"max_distance={self.max_distance}, bidirectional={self.bidirectional}"


class ALiBi(torch.nn.Module):
    """Slopes of linear distance penalties (arXiv:2108.12409): `alibi_slopes` of `fastattn.attention`.

    slopes: float32 [num_heads], a buffer that is not saved: 2^(-8 (h + 1) / H) where H is a power of two; other H take
    those of the power below, then every second one of the power above, as the paper's code.

    forward(): the slopes. `bias(Sq, Sk)`: the penalties as a tensor [1, H, Sq, Sk], for what takes no slopes.
    """

    def __init__(self, num_heads: int, device=None) -> None:
        super().__init__()
        self.num_heads = positive("num_heads", num_heads)
        below = 1 << (num_heads.bit_length() - 1)
        slopes = [2.0 ** (-8.0 * (h + 1) / below) for h in range(below)]
        slopes += [2.0 ** (-4.0 * (2 * h + 1) / below) for h in range(num_heads - below)]
        self.register_buffer("slopes", torch.tensor(slopes, device=device), persistent=False)

    def forward(self) -> Tensor:
        return self.slopes

    def bias(self, Sq: int, Sk: int) -> Tensor:
        distance = torch.arange(1 - Sq, Sk, device=self.slopes.device).abs()
        return by_distance(-self.slopes.unsqueeze(1) * distance, Sq, Sk).unsqueeze(0)

    def extra_repr(self) -> str:
        return f"{self.num_heads}"
