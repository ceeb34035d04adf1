"""What torch's layers and stacks refuse, fastattn.nn's refuse in the same place, naming what was given."""

import pytest
import torch

from fastattn import nn as fnn

E, H, N, L, S = 24, 4, 2, 5, 7


def hidden(*shape, dtype=torch.bool):
    return torch.zeros(shape, dtype=dtype)


def tokens(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


x, memory = tokens(N, L, E), tokens(N, S, E)

# Of one attention: an argument for keys of length `keys`, and words of the message. Names in words are those of
# torch.nn.MultiheadAttention where it is that which refuses.
PADDING = {
    "dtype": (lambda keys: hidden(N, keys, dtype=torch.int), "only bool and floating types of {name}.*int32"),
    "batch": (lambda keys: hidden(N + 1, keys), r"key_padding_mask.shape\[0\] to be 2, but got 3"),
    "keys": (lambda keys: hidden(N, keys + 1), r"key_padding_mask.shape\[1\] to be {keys}, but got {more}"),
    "rank": (lambda keys: hidden(keys), "expected `key_padding_mask` to be `None` or 2-D but found 1-D"),
}
MASK = {
    "rank": (lambda keys: hidden(keys), "expected `attn_mask` to be `None`, 2-D or 3-D but found 1-D"),
    "dtype": (lambda keys: hidden(L, keys, dtype=torch.int), "only bool and floating types of {name}.*int32"),
    "size": (
        lambda keys: hidden(keys + 1, L),
        r"2D attn_mask is \({more}, 5\), but should be \(5, {keys}\)",
    ),
    "heads": (
        lambda keys: hidden(N, L, keys),
        r"3D attn_mask is \(2, 5, {keys}\), but should be \(8, 5, {keys}\)",
    ),
}


def of_arguments(inputs, padding, mask, causal, keys):
    """Calls of one attention: (inputs, keywords, words of the message)."""
    calls = {}
    for name, table in ((padding, PADDING), (mask, MASK)):
        for kind, (make, words) in table.items():
            words = (
                words.replace("{name}", name).replace("{keys}", str(keys)).replace("{more}", str(keys + 1))
            )
            calls[f"{name}, {kind}"] = (inputs, {name: make(keys)}, words)
    calls[causal] = (inputs, {causal: True}, "Need attn_mask if specifying the is_causal hint")
    return calls


ENCODER_LAYER = {
    "rank 1": ((tokens(E),), {}, "unbatched 2D or batched 3D.*1-D"),
    "rank 4": ((x[None],), {}, "unbatched 2D or batched 3D.*4-D"),
    "width": ((tokens(N, L, E + 1),), {}, "embedding dimension of 24, but got 25"),
    "dtype": ((x.double(),), {}, "Double and Float"),
    "integers": ((x.long(),), {}, "Long and Float"),
    "one sequence, rank of padding": (
        (x[0],),
        dict(src_key_padding_mask=hidden(1, L)),
        "1-D but found 2-D",
    ),
    "one sequence, mask": ((x[0],), dict(src_mask=hidden(N * H, L, L)), r"\(4, 5, 5\) but got \(8, 5, 5\)"),
    **of_arguments((x,), "src_key_padding_mask", "src_mask", "is_causal", L),
}
DECODER = {
    "rank 4": ((x[None], memory), {}, "unbatched 2D or batched 3D.*4-D"),
    "rank of memory": ((x, memory[0]), {}, "3-D but found 2-D and 2-D"),
    "width": ((tokens(N, L, E + 1), memory), {}, "embedding dimension of 24, but got 25"),
    "width of memory": ((x, tokens(N, S, E + 1)), {}, "14x25 and 24x48"),
    "batch of memory": ((x, tokens(N + 1, S, E)), {}, "same batch size, got 2 and 3"),
    "dtype": ((x.double(), memory), {}, "Double and Float"),
    "dtype of memory": ((x, memory.double()), {}, "Double and Float"),
    **of_arguments((x, memory), "tgt_key_padding_mask", "tgt_mask", "tgt_is_causal", L),
    **of_arguments((x, memory), "memory_key_padding_mask", "memory_mask", "memory_is_causal", S),
}
# torch.nn.TransformerDecoder takes an integer tgt_mask for a number, and raises of overflow.
DECODER_STACK = {name: call for name, call in DECODER.items() if name != "tgt_mask, dtype"}
TRANSFORMER = {
    "batch": ((memory, tokens(N + 1, L, E)), {}, "the batch number of src and tgt must be equal"),
    "width": ((memory, tokens(N, L, E + 1)), {}, "feature number of src and tgt must be equal to d_model"),
    **of_arguments((memory, x), "src_key_padding_mask", "src_mask", "src_is_causal", S),
    **{
        name: ((inputs[1], inputs[0]), keywords, words)
        for name, (inputs, keywords, words) in DECODER_STACK.items()
        if keywords
    },
}
# src_mask of a Transformer is the encoder's `mask`, S x S.
TRANSFORMER["src_mask, dtype"] = ((memory, x), dict(src_mask=hidden(S, S, dtype=torch.int)), "types of mask")
TRANSFORMER["src_mask, size"] = (
    (memory, x),
    dict(src_mask=hidden(S, L)),
    r"\(7, 5\), but should be \(7, 7\)",
)
TRANSFORMER["src_mask, heads"] = (
    (memory, x),
    dict(src_mask=hidden(N, S, S)),
    r"\(2, 7, 7\), but .* \(8, 7, 7\)",
)

MODULES = {
    "encoder layer": (lambda nn: nn.TransformerEncoderLayer(E, H, 40, batch_first=True), ENCODER_LAYER),
    "decoder layer": (lambda nn: nn.TransformerDecoderLayer(E, H, 40, batch_first=True), DECODER),
    "decoder": (
        lambda nn: nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 40, batch_first=True), 1),
        DECODER_STACK,
    ),
    "transformer": (lambda nn: nn.Transformer(E, H, 1, 1, 40, batch_first=True), TRANSFORMER),
}


@pytest.mark.parametrize("name", MODULES)
def test_refuses_what_torch_refuses(name):
    make, calls = MODULES[name]
    theirs, ours = make(torch.nn), make(fnn)
    for kind, (inputs, keywords, words) in calls.items():
        with pytest.raises(Exception) as refused:
            theirs(*inputs, **keywords)
        with pytest.raises(refused.type, match=words):
            ours(*inputs, **keywords)
            pytest.fail(f"took {kind}")


NO_MASKS = {
    "encoder layer": ("src_mask", "src_key_padding_mask"),
    "decoder layer": ("tgt_mask", "memory_mask", "tgt_key_padding_mask", "memory_key_padding_mask"),
    "decoder": ("tgt_mask", "memory_mask", "tgt_key_padding_mask", "memory_key_padding_mask"),
    "transformer": ("tgt_mask", "memory_mask", "src_key_padding_mask", "memory_key_padding_mask"),
}


@pytest.mark.parametrize("name", NO_MASKS)
def test_what_is_no_mask_is_named(name):
    """torch fails inside, by AttributeError or RuntimeError."""
    ours = MODULES[name][0](fnn)
    inputs = {"encoder layer": (x,), "transformer": (memory, x)}.get(name, (x, memory))
    for argument in NO_MASKS[name]:
        with pytest.raises(TypeError, match=f"{argument} must be a tensor.* or None, got list"):
            ours(*inputs, **{argument: [True]})


def wide(size):
    return tokens(N, L, size)


# Of the modules torch lacks: what must not pass, and words of the message.
BEYOND = {
    "grouped, query": (
        lambda: fnn.GroupedQueryAttention(E, H, 2)(wide(25)),
        r"query must have width 24.*25\]",
    ),
    "grouped, key": (
        lambda: fnn.GroupedQueryAttention(E, H, 2, kdim=10)(x, wide(11), wide(E)),
        r"key must have width 10, got shape \[2, 5, 11\]",
    ),
    "grouped, value": (
        lambda: fnn.GroupedQueryAttention(E, H, 2, vdim=14)(x, x, wide(13)),
        r"value must have width 14, got shape \[2, 5, 13\]",
    ),
    "grouped, batch": (lambda: fnn.GroupedQueryAttention(E, H, 2)(x, tokens(3, L, E)), "do not broadcast"),
    "grouped, mask": (
        lambda: fnn.GroupedQueryAttention(E, H, 2)(x, mask=hidden(L, L + 1)),
        r"\[5, 6\] does not broadcast to \[2, 4, 5, 5\]",
    ),
    "shaw, mask": (
        lambda: fnn.ShawRelativeAttention(E, H, 3)(x, mask=hidden(L, L + 1)),
        r"\[5, 6\] does not broadcast to \[2, 4, 5, 5\]",
    ),
    "transformer-xl, mask": (
        lambda: fnn.TransformerXLAttention(E, H)(x, x, mask=hidden(L, L)),
        r"\(5, 5\) does not broadcast.*\[2, 4, 5, 10\]",
    ),
    "feed forward, d_model": (lambda: fnn.FeedForward(0, 8), "d_model must be an int of at least 1, got 0"),
    "feed forward, d_hidden": (
        lambda: fnn.FeedForward(8, -1),
        "d_hidden must be an int of at least 1, got -1",
    ),
    "add norm, shapes": (
        lambda: fnn.AddNorm(E)(x, x[:, :4]),
        r"same shape, got \[2, 5, 24\] and \[2, 4, 24\]",
    ),
    "add norm, width": (lambda: fnn.AddNorm(E + 1)(x, x), r"\[2, 5, 24\].*got \[25\]"),
    "sinusoidal, positions": (
        lambda: fnn.SinusoidalPositionalEncoding(E)(x, torch.arange(4)),
        r"positions must be \[5\] or \[N, 5\] like the tokens of x, got \[4\]",
    ),
    "sinusoidal, base": (
        lambda: fnn.SinusoidalPositionalEncoding(E, base=-1.0),
        "base must be positive, got -1.0",
    ),
    "t5, heads": (lambda: fnn.T5RelativeBias(0), "num_heads must be an int of at least 1, got 0"),
    "t5, lengths": (lambda: fnn.T5RelativeBias(3)(0, 4), "Sq and Sk must be at least 1, got 0 and 4"),
    "alibi, lengths": (lambda: fnn.ALiBi(3).bias(4, 0), "Sq and Sk must be at least 1, got 4 and 0"),
}


@pytest.mark.parametrize(("call", "words"), BEYOND.values(), ids=BEYOND)
def test_modules_that_torch_lacks(call, words):
    with pytest.raises(ValueError, match=words):
        call()
