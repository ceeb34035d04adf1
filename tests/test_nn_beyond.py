"""The modules torch lacks, each against a straightforward formula: loops over heads, rows and frequencies."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn import masks
from fastattn import nn as fnn

DTYPES = [torch.float64, torch.float32]


def close(a, b, factor=1.0):
    tolerance = factor * (1e-10 if b.dtype == torch.float64 else 3e-5)
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def randomise(module):
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return module


def same_gradients(y, expected, needs):
    dy = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, needs, dy), torch.autograd.grad(expected, needs, dy)):
        close(a, b, 20.0)


def softmax_rows(scores, seen):
    """[S, T] row by row; a row that sees nothing is 0."""
    rows = []
    for s, m in zip(scores, seen):
        rows.append(s.masked_fill(~m, -math.inf).softmax(0) if m.any() else torch.zeros_like(s))
    return torch.stack(rows)


GQA_CASES = {
    "plain": (dict(num_kv_heads=2), {}),
    "causal": (dict(num_kv_heads=4, bias=True), dict(is_causal=True)),
    "window, narrow heads": (
        dict(num_kv_heads=1, head_dim=6, bias=True, out_bias=False),
        dict(is_causal=True),
    ),
    "norms": (dict(num_kv_heads=2, qk_norm="rms_norm", scale=0.3, softcap=2.0), dict(is_causal=True)),
    "layer norm": (dict(num_kv_heads=2, qk_norm="layer_norm"), {}),
    "rope": (dict(num_kv_heads=2, rope=fnn.RotaryEmbedding(8)), dict(is_causal=True)),
    "rope, norms": (
        dict(num_kv_heads=2, qk_norm="rms_norm", rope=fnn.RotaryEmbedding(4, layout="interleaved")),
        {},
    ),
    "cross": (dict(num_kv_heads=2, kdim=10, vdim=14), {}),
}


def rotated(x, positions, rope):
    """x [S, D], pairs turned as complex numbers, one by one."""
    out = x.clone()
    half = rope.dim // 2
    for n in range(half):
        a, b = (n, n + half) if rope.layout == "half" else (2 * n, 2 * n + 1)
        angle = positions.to(x.dtype) * float(rope.inverse_frequencies[n])
        # Angles are float32 in the module.
        angle = (positions.float() * rope.inverse_frequencies[n]).to(x.dtype)
        turned = torch.complex(x[:, a], x[:, b]) * torch.polar(torch.ones_like(angle), angle)
        out[:, a], out[:, b] = turned.real * rope.magnitude, turned.imag * rope.magnitude
    return out


def grouped_formula(m, query, key, value, seen, positions=None):
    items = []
    for b in range(query.shape[0]):
        q, k, v = m.q_proj(query[b]), m.k_proj(key[b]), m.v_proj(value[b])
        heads = []
        for h in range(m.num_heads):
            g = h // (m.num_heads // m.num_kv_heads)
            qh = q[:, h * m.head_dim : (h + 1) * m.head_dim]
            kh, vh = (t[:, g * m.head_dim : (g + 1) * m.head_dim] for t in (k, v))
            if m.q_norm is not None:
                qh, kh = (
                    F.rms_norm(t, t.shape[-1:], n.weight, n.eps)
                    if isinstance(n, torch.nn.RMSNorm)
                    else F.layer_norm(t, t.shape[-1:], n.weight, n.bias, n.eps)
                    for t, n in ((qh, m.q_norm), (kh, m.k_norm))
                )
            if m.rope is not None:
                i = torch.arange(len(qh)) if positions is None else positions
                qh, kh = (
                    rotated(qh, i, m.rope),
                    rotated(kh, torch.arange(len(kh)) if positions is None else i, m.rope),
                )
            s = qh @ kh.t() * (m.head_dim**-0.5 if m.scale is None else m.scale)
            s = s if m.softcap is None else m.softcap * torch.tanh(s / m.softcap)
            heads.append(softmax_rows(s, seen) @ vh)
        items.append(m.o_proj(torch.cat(heads, 1)))
    return torch.stack(items)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GQA_CASES)
def test_grouped_query_attention(name, dtype):
    arguments, call = GQA_CASES[name]
    module = randomise(fnn.GroupedQueryAttention(32, 4, dtype=dtype, **copy.deepcopy(arguments)))
    x = torch.randn(2, 7, 32, dtype=dtype, requires_grad=True)
    key, value = x, x
    if name == "cross":
        key = torch.randn(2, 9, 10, dtype=dtype, requires_grad=True)
        value = torch.randn(2, 9, 14, dtype=dtype, requires_grad=True)
    seen = torch.ones(7, key.shape[1], dtype=torch.bool)
    seen = seen.tril() if call.get("is_causal") else seen
    if name.startswith("window"):
        call = call | {"mask": masks.SlidingWindow(2, None)}
        seen = seen.triu(-2)
    y = module(*((x, key, value) if name == "cross" else (x,)), **call)
    expected = grouped_formula(module, x, key, value, seen)
    close(y, expected)
    same_gradients(y, expected, [x, *module.parameters()])
    close(module(x[0], *((key[0], value[0]) if name == "cross" else ()), **call), expected[0])
    if name == "plain":
        y, weights = module(x, mask=torch.ones(7, 7, dtype=torch.bool).tril(), need_weights=True)
        assert weights.shape == (2, 4, 7, 7) and not weights.triu(1).any()
        close(weights.sum(-1), torch.ones(2, 4, 7, dtype=dtype))
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert list(copied.state_dict()) == list(module.state_dict())


def test_grouped_positions_and_multi_query():
    module = randomise(fnn.MultiQueryAttention(32, 4, rope=fnn.RotaryEmbedding(8)))
    assert module.num_kv_heads == 1 and module.k_proj.out_features == 8
    x = torch.randn(2, 7, 32)
    positions = torch.tensor([3, 4, 5, 9, 10, 11, 20])
    expected = grouped_formula(module, x, x, x, torch.ones(7, 7, dtype=torch.bool), positions)
    close(module(x, positions=positions), expected)
    close(module(x, positions=positions.expand(2, 7)), expected)
    # Rotations are relative: a shift of all positions changes nothing.
    close(module(x, positions=positions + 5), expected, 10.0)
    assert module.explain(x, is_causal=True).kernel == "cpu"


def test_grouped_bad_input():
    for arguments, message in (
        ((30, 4, 2), "embed_dim=30 and num_heads=4"),
        ((32, 4, 3), "num_heads=4 and num_kv_heads=3"),
        ((32, 0, 1), "num_heads must be"),
    ):
        with pytest.raises(ValueError, match=message):
            fnn.GroupedQueryAttention(*arguments)
    with pytest.raises(ValueError, match="rope rotates 16 elements and head_dim is 8"):
        fnn.GroupedQueryAttention(32, 4, 2, rope=fnn.RotaryEmbedding(16))
    with pytest.raises(ValueError, match="qk_norm"):
        fnn.GroupedQueryAttention(32, 4, 2, qk_norm="batch_norm")
    for keywords, message in (
        (dict(dropout=1.5), r"dropout must be in \[0, 1\), got 1.5"),
        (dict(softcap=-1.0), "softcap must be positive"),
        (dict(kdim=0), "kdim must be an int of at least 1"),
        (dict(vdim=2.5), "vdim must be an int of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            fnn.GroupedQueryAttention(32, 4, 2, **keywords)
    module = fnn.GroupedQueryAttention(32, 4, 2)
    with pytest.raises(ValueError, match="positions are for rope"):
        module(torch.randn(1, 3, 32), positions=torch.arange(3))
    with pytest.raises(ValueError, match="is_causal=True goes with"):
        module(torch.randn(1, 3, 32), mask=torch.zeros(3, 3), is_causal=True)
    with pytest.raises(ValueError, match="query, key and value"):
        module(torch.randn(3, 32), torch.randn(1, 3, 32))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rotary_embedding(layout, dtype):
    rope = fnn.RotaryEmbedding(8, base=500.0, layout=layout)
    x = torch.randn(2, 3, 5, 10, dtype=dtype)
    y = rope(x)
    assert y.dtype == dtype and torch.equal(y[..., 8:], x[..., 8:]) and torch.equal(y[:, :, 0], x[:, :, 0])
    for n in range(4):
        torch.testing.assert_close(
            rope.inverse_frequencies[n].item(), 500.0 ** (-2 * n / 8), atol=0.0, rtol=1e-6
        )
    expected = rotated(x[1, 2].double(), torch.arange(5), rope)
    torch.testing.assert_close(
        y[1, 2].double(), expected, atol=2e-2 if dtype == torch.bfloat16 else 1e-6, rtol=1e-6
    )
    assert not list(rope.state_dict())


def test_rotary_scalings():
    def frequencies(kind, **numbers):
        return fnn.RotaryEmbedding(
            16, 10000.0, scaling={"type": kind, **numbers}
        ).inverse_frequencies.double()

    plain = torch.tensor([10000.0 ** (-2 * n / 16) for n in range(8)], dtype=torch.float64)
    torch.testing.assert_close(frequencies("linear", factor=4.0), plain / 4, rtol=1e-6, atol=0)
    base = 10000.0 * 4 ** (16 / 14)
    expected = torch.tensor([base ** (-2 * n / 16) for n in range(8)], dtype=torch.float64)
    torch.testing.assert_close(frequencies("ntk", factor=4.0), expected, rtol=1e-6, atol=0)
    # Llama 3: short wavelengths stay, long ones are divided, those between are mixed.
    expected = []
    for f in plain.tolist():
        length = 2 * math.pi / f
        if length < 8192 / 4:
            expected.append(f)
        elif length > 8192 / 1:
            expected.append(f / 8)
        else:
            smooth = (8192 / length - 1) / (4 - 1)
            expected.append((1 - smooth) * f / 8 + smooth * f)
    llama = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192)
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(frequencies("llama3", **llama), expected, rtol=1e-5, atol=0)
    # YaRN: a ramp over dimensions between 32 and 1 turns in the original length.
    low = math.floor(16 * math.log(4096 / (32 * 2 * math.pi)) / (2 * math.log(10000.0)))
    high = math.ceil(16 * math.log(4096 / (1 * 2 * math.pi)) / (2 * math.log(10000.0)))
    expected = []
    for n, f in enumerate(plain.tolist()):
        share = min(max((n - low) / (high - low), 0.0), 1.0)
        expected.append(f * (1 - share) + f / 16 * share)
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(
        frequencies("yarn", factor=16.0, original_length=4096), expected, rtol=1e-5, atol=0
    )
    yarn = fnn.RotaryEmbedding(16, scaling={"type": "yarn", "factor": 16.0, "original_length": 4096})
    x = torch.randn(3, 16)
    torch.testing.assert_close(yarn(x)[0], x[0] * (0.1 * math.log(16.0) + 1.0))
    for scaling, message in (
        ({"type": "dynamic"}, "must be one of"),
        ({"type": "linear"}, "wrong: factor"),
        ({"type": "ntk", "factor": 2.0, "alpha": 1}, "wrong: alpha"),
        ({"type": "linear", "factor": 0.0}, r"scaling\['factor'\] must be positive, got 0.0"),
        (
            dict(type="llama3", factor=8.0, low_freq_factor=4.0, high_freq_factor=4.0, original_length=64),
            "low_freq_factor must be below high_freq_factor",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            fnn.RotaryEmbedding(8, scaling=scaling)
    with pytest.raises(ValueError, match="dim must be 4 or more"):
        fnn.RotaryEmbedding(2, scaling={"type": "ntk", "factor": 2.0})
    with pytest.raises(ValueError, match="base must be positive, got -1"):
        fnn.RotaryEmbedding(8, base=-1)
    with pytest.raises(ValueError, match=r"positions must be \[3\] or \[N, 3\].*\[4\]"):
        fnn.RotaryEmbedding(8)(torch.randn(3, 8), torch.arange(4))
    for dim in (7, 0, 2.0):
        with pytest.raises(ValueError, match="dim must be an even int"):
            fnn.RotaryEmbedding(dim)
    with pytest.raises(ValueError, match="layout"):
        fnn.RotaryEmbedding(8, layout="pairs")
    with pytest.raises(ValueError, match="x must be"):
        fnn.RotaryEmbedding(8)(torch.randn(3, 6))


@pytest.mark.parametrize("interleaved", [True, False])
def test_sinusoidal_positional_encoding(interleaved):
    module = fnn.SinusoidalPositionalEncoding(6, base=100.0, interleaved=interleaved)
    expected = torch.zeros(5, 6)
    for position in range(5):
        for n in range(3):
            angle = position / 100.0 ** (2 * n / 6)
            expected[position, 2 * n if interleaved else n] = math.sin(angle)
            expected[position, 2 * n + 1 if interleaved else n + 3] = math.cos(angle)
    x = torch.randn(2, 5, 6)
    close(module(x), x + expected)
    close(module(x[0]), x[0] + expected)
    close(
        module(x[:, :2], torch.tensor([[3, 0], [1, 4]])), x[:, :2] + expected[torch.tensor([[3, 0], [1, 4]])]
    )
    late = fnn.SinusoidalPositionalEncoding(6, base=100.0, interleaved=interleaved, batch_first=False)
    close(late(x.transpose(0, 1)), (x + expected).transpose(0, 1))
    assert module(x.bfloat16()).dtype == torch.bfloat16 and not module.state_dict()
    with pytest.raises(ValueError, match="d_model must be an even int"):
        fnn.SinusoidalPositionalEncoding(5)
    with pytest.raises(ValueError, match="x must be"):
        module(torch.randn(2, 5, 8))


def t5_bucket(distance, buckets, most, bidirectional):
    base = 0
    if bidirectional:
        buckets //= 2
        base, distance = (buckets if distance > 0 else 0), abs(distance)
    else:
        distance = max(-distance, 0)
    exact = buckets // 2
    if distance < exact:
        return base + distance
    far = exact + int(math.log(distance / exact) / math.log(most / exact) * (buckets - exact))
    return base + min(far, buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_t5_relative_bias(bidirectional):
    module = fnn.T5RelativeBias(3, 16, 50, bidirectional)
    bias = module(9, 80)
    assert bias.shape == (1, 3, 9, 80)
    weight = module.relative_attention_bias.weight
    for i in (0, 3, 8):
        for j in range(80):
            assert torch.equal(bias[0, :, i, j], weight[t5_bucket(j - i, 16, 50, bidirectional)])
    close(module(2, 80, offset=7), bias[:, :, 7:9])
    q, k = torch.randn(1, 3, 9, 8), torch.randn(1, 3, 80, 8)
    out = fastattn.attention(q, k, k, bias=bias, scale=1.0)
    expected = (q @ k.transpose(2, 3) + bias).softmax(-1) @ k
    close(out, expected)
    dy = torch.randn_like(out)
    (got,), (want,) = (torch.autograd.grad(t, [weight], dy, retain_graph=True) for t in (out, expected))
    close(got, want, 10.0)
    with pytest.raises(ValueError, match="num_buckets"):
        fnn.T5RelativeBias(3, 3)
    with pytest.raises(ValueError, match="max_distance must exceed"):
        fnn.T5RelativeBias(3, 32, 4)


def test_t5_relative_bias_is_transformers_s():
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = torch.arange(-300, 300)
    for bidirectional in (True, False):
        module = fnn.T5RelativeBias(2, 32, 128, bidirectional)
        expected = t5.T5Attention._relative_position_bucket(distance, bidirectional, 32, 128)
        assert torch.equal(module.buckets(distance), expected)


def test_alibi():
    slopes = fnn.ALiBi(8)()
    close(slopes, torch.tensor([2.0**-h for h in range(1, 9)]))
    twelve = fnn.ALiBi(12)()
    close(twelve[:8], slopes)
    close(twelve[8:], torch.tensor([2.0 ** (-0.5 * h) for h in (1, 3, 5, 7)]))
    bias = fnn.ALiBi(3).bias(4, 6)
    for h in range(3):
        for i in range(4):
            for j in range(6):
                assert math.isclose(bias[0, h, i, j], -float(fnn.ALiBi(3)()[h]) * abs(i - j), rel_tol=1e-6)
    q, k = torch.randn(1, 3, 4, 8), torch.randn(1, 3, 6, 8)
    alibi = fnn.ALiBi(3)
    close(
        fastattn.attention(q, k, k, alibi_slopes=alibi()), fastattn.attention(q, k, k, bias=alibi.bias(4, 6))
    )
    with pytest.raises(ValueError, match="num_heads"):
        fnn.ALiBi(0)


def shaw_formula(m, x, causal):
    items = []
    for b in range(x.shape[0]):
        q, k, v = m.q_proj(x[b]), m.k_proj(x[b]), m.v_proj(x[b])
        S, heads = x.shape[1], []
        for h in range(m.num_heads):
            part = slice(h * m.head_dim, (h + 1) * m.head_dim)
            rows = []
            for i in range(S):
                last = i + 1 if causal else S
                clipped = [
                    min(max(j - i, -m.max_distance), m.max_distance) + m.max_distance for j in range(last)
                ]
                keys = k[:last, part] + m.key_table[clipped]
                values = v[:last, part]
                if m.value_table is not None:
                    values = values + m.value_table[clipped]
                weights = (keys @ q[i, part] / math.sqrt(m.head_dim)).softmax(0)
                rows.append(weights @ values)
            heads.append(torch.stack(rows))
        items.append(m.out_proj(torch.cat(heads, 1)))
    return torch.stack(items)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("values", [False, True])
def test_shaw(values, causal, dtype):
    module = randomise(fnn.ShawRelativeAttention(12, 3, 4, values=values, dtype=dtype))
    x = torch.randn(2, 11, 12, dtype=dtype, requires_grad=True)
    y, expected = module(x, is_causal=causal), shaw_formula(module, x, causal)
    close(y, expected)
    same_gradients(y, expected, [x, *module.parameters()])
    explanation = str(module.explain(x, is_causal=causal))
    assert ("the reference path" in explanation) == values
    assert "bias" in explanation


def test_shaw_dropout_is_one_for_output_and_values():
    """With values of 1 and terms of 1, the output is twice the sum of the kept weights."""
    module = fnn.ShawRelativeAttention(4, 1, 2, dropout=0.5, bias=False)
    with torch.no_grad():
        module.v_proj.weight.zero_()
        module.value_table.fill_(1.0)
        module.out_proj.weight.copy_(torch.eye(4))
    x = torch.randn(1, 64, 4)
    sums = module(x)
    assert sums.std() > 0.05 and torch.allclose(sums[..., 0], sums[..., 1])
    close(module.eval()(x), torch.ones(1, 64, 4))


def xl_formula(m, x, memory, causal):
    M = 0 if memory is None else memory.shape[1]
    items = []
    for b in range(x.shape[0]):
        keys = x[b] if memory is None else torch.cat([memory[b], x[b]])
        q, k, v = m.q_proj(x[b]), m.k_proj(keys), m.v_proj(keys)
        S, T, heads = x.shape[1], len(keys), []
        half = m.embed_dim // 2
        r = {}
        for d in range(-S, M + S):
            angles = [d / 10000.0 ** (2 * n / m.embed_dim) for n in range(half)]
            wave = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            r[d] = m.r_proj(torch.tensor(wave, dtype=torch.float32).to(x.dtype))
        for h in range(m.num_heads):
            part = slice(h * m.head_dim, (h + 1) * m.head_dim)
            rows = []
            for i in range(S):
                last = M + i + 1 if causal else T
                score = [
                    (q[i, part] + m.content_bias[h]) @ k[j, part]
                    + (q[i, part] + m.position_bias[h]) @ r[i + M - j][part]
                    for j in range(last)
                ]
                rows.append((torch.stack(score) / math.sqrt(m.head_dim)).softmax(0) @ v[:last, part])
            heads.append(torch.stack(rows))
        items.append(m.out_proj(torch.cat(heads, 1)))
    return torch.stack(items)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [0, 5])
def test_transformer_xl(length, causal, dtype):
    module = randomise(fnn.TransformerXLAttention(12, 3, dtype=dtype))
    x = torch.randn(2, 6, 12, dtype=dtype, requires_grad=True)
    memory = torch.randn(2, length, 12, dtype=dtype, requires_grad=True) if length else None
    y, expected = module(x, memory, is_causal=causal), xl_formula(module, x, memory, causal)
    # Sines of the module are of float32 angles.
    tolerance = 3e-5
    torch.testing.assert_close(y, expected, atol=tolerance, rtol=tolerance)
    dy = torch.randn_like(y)
    needs = [x, *module.parameters()]
    for a, b in zip(torch.autograd.grad(y, needs, dy), torch.autograd.grad(expected, needs, dy)):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    assert "bias" in str(module.explain(x, memory))
    if memory is not None:
        assert not torch.autograd.grad(module(x, memory).sum(), memory, allow_unused=True)[0]


def test_transformer_xl_segments_are_one_sequence():
    """Two segments with memory see what one long segment sees, in one layer."""
    module = randomise(fnn.TransformerXLAttention(12, 3))
    x = torch.randn(1, 10, 12)
    whole = module(x)
    close(module(x[:, 6:], x[:, :6]), whole[:, 6:], 3.0)
    window = masks.SlidingWindow(3, None, lower_right=True)
    close(module(x[:, 6:], x[:, :6], mask=window), module(x, mask=masks.SlidingWindow(3, None))[:, 6:], 3.0)


def test_relative_bad_input():
    with pytest.raises(ValueError, match="embed_dim=10 and num_heads=3"):
        fnn.ShawRelativeAttention(10, 3, 4)
    with pytest.raises(ValueError, match="max_distance"):
        fnn.ShawRelativeAttention(12, 3, 0)
    with pytest.raises(ValueError, match="embed_dim must be an even int"):
        fnn.TransformerXLAttention(9, 3)
    module = fnn.TransformerXLAttention(12, 3)
    with pytest.raises(ValueError, match="memory and x"):
        module(torch.randn(2, 3, 12), torch.randn(1, 3, 12))
    with pytest.raises(ValueError, match="x must be"):
        module(torch.randn(3, 12))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
def test_feed_forward(activation, dtype):
    module = fnn.FeedForward(16, 24, activation, bias=activation != "swiglu", dtype=dtype)
    x = torch.randn(2, 70, 16, dtype=dtype, requires_grad=True)
    wide = copy.deepcopy(module).double()
    h = wide.linear1(x.double())
    if activation == "relu":
        h = h.clamp(min=0)
    elif activation == "gelu":
        h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    else:
        gate = wide.gate(x.double())
        h = gate * torch.sigmoid(gate) * h
    expected = wide.linear2(h)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    y = module(x)
    torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)
    with torch.no_grad():  # the activation is inside the product
        torch.testing.assert_close(module(x).double(), expected, atol=tolerance, rtol=tolerance)
    dy = torch.randn_like(y)
    (got,), (want,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy.double())
    torch.testing.assert_close(got, want, atol=3 * tolerance, rtol=tolerance)
    with pytest.raises(ValueError, match="activation must be"):
        fnn.FeedForward(4, 4, "tanh")


@pytest.mark.parametrize(
    "make",
    [
        lambda: fnn.GroupedQueryAttention(16, 4, 2, qk_norm="rms_norm", rope=fnn.RotaryEmbedding(4)),
        lambda: fnn.ShawRelativeAttention(16, 4, 3),
        lambda: fnn.TransformerXLAttention(16, 4),
        lambda: fnn.FeedForward(16, 8, "swiglu"),
        lambda: fnn.AddNorm(16),
    ],
)
def test_half_precision_and_autocast(make):
    module = make().eval()
    x = torch.randn(2, 9, 16)
    inputs = (x, x) if isinstance(module, fnn.AddNorm) else (x,)
    y = module(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(module(*inputs).float(), y, atol=5e-2, rtol=5e-2)
    half = module.bfloat16()(*(t.bfloat16() for t in inputs))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), y, atol=5e-2, rtol=5e-2)


COPIED = {
    "add norm": (lambda: fnn.AddNorm(12, "rms_norm", "pre", dropout=0.1), 2),
    "feed forward": (lambda: fnn.FeedForward(12, 20, "swiglu", bias=False, dropout=0.1), 1),
    "sinusoidal": (lambda: fnn.SinusoidalPositionalEncoding(12, 0.1, 100.0, False), 1),
    "rotary": (
        lambda: fnn.RotaryEmbedding(4, scaling={"type": "yarn", "factor": 4.0, "original_length": 8}),
        1,
    ),
    "t5": (lambda: fnn.T5RelativeBias(3, 16, 50, bidirectional=False), 0),
    "alibi": (lambda: fnn.ALiBi(6), 0),
    "multi-query": (lambda: fnn.MultiQueryAttention(12, 3, rope=fnn.RotaryEmbedding(4), softcap=5.0), 1),
    "shaw": (lambda: fnn.ShawRelativeAttention(12, 3, 2, dropout=0.1), 1),
    "transformer-xl": (lambda: fnn.TransformerXLAttention(12, 3, dropout=0.1), 2),
}


@pytest.mark.parametrize("name", COPIED)
def test_copies_pickles_and_state(name):
    """Copies compute the same and share nothing; the state of one goes into a fresh other."""
    make, inputs = COPIED[name]
    module = randomise(make()).eval()
    x = [torch.randn(2, 5, 12) for _ in range(inputs)]

    def run(m):
        results = m(7, 9) if name == "t5" else m(*x)
        return results if isinstance(results, tuple) else (results,)

    fresh = make().eval()
    fresh.load_state_dict(module.state_dict())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), fresh):
        assert type(other) is type(module) and repr(other) == repr(module)
        assert list(other.state_dict()) == list(module.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(run(other), run(module)))
        pairs = zip((*module.parameters(), *module.buffers()), (*other.parameters(), *other.buffers()))
        assert all(a.data_ptr() != b.data_ptr() for a, b in pairs)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: fnn.GroupedQueryAttention(12, 2, 1, dropout=0.1, device=x.device)(x, need_weights=True)[1],
        lambda x: fnn.ShawRelativeAttention(12, 2, 3, dropout=0.1, device=x.device)(x),
        lambda x: fnn.TransformerXLAttention(12, 2, dropout=0.1, device=x.device)(x, x),
        lambda x: fnn.MultiheadAttention(12, 2, dropout=0.1, device=x.device)(x, x, x)[1],
    ],
    ids=["grouped", "shaw", "transformer-xl", "multi-head"],
)
def test_dropout_of_weights_is_drawn_on_the_device(call):
    assert call(torch.randn(2, 5, 12, device="meta")).device.type == "meta"


@pytest.mark.parametrize(
    "module",
    [
        fnn.GroupedQueryAttention(12, 2, 1, dropout=0.25),
        fnn.ShawRelativeAttention(12, 2, 3, dropout=0.25),
        fnn.TransformerXLAttention(12, 2, dropout=0.25),
        fnn.MultiheadAttention(12, 2, dropout=0.25),
    ],
    ids=lambda module: type(module).__name__,
)
def test_explain_tells_the_dropout_of_training(module):
    x = torch.randn(2, 5, 12)
    inputs = (x, x, x) if isinstance(module, fnn.MultiheadAttention) else (x,)
    assert "dropout 0.25" in str(module.train().explain(*inputs))
    assert "dropout" not in str(module.eval().explain(*inputs))
