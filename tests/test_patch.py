"""`sdpa_patch`: which calls it serves, what it passes on, and that it leaves nothing behind."""

from __future__ import annotations

import sys
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import fastattn

# In a tuple: a module's global would be patched like any name imported from torch.nn.functional.
ORIGINAL = (F.scaled_dot_product_attention,)


@pytest.fixture(autouse=True)
def nothing_left_behind():
    yield
    assert F.scaled_dot_product_attention is ORIGINAL[0]
    assert torch.backends.mha.get_fastpath_enabled()


def qkv(Sq=5, Sk=9, **kind):
    return [torch.randn(2, 4, S, 16, **kind) for S in (Sq, Sk, Sk)]


def importer(name):
    module = types.ModuleType(name)
    exec("from torch.nn.functional import scaled_dot_product_attention as attend", module.__dict__)
    sys.modules[name] = module
    return module


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"is_causal": True},
        {"attn_mask": torch.ones(5, 9, dtype=torch.bool).tril(2)},
        {"attn_mask": torch.randn(5, 9), "scale": 0.2},
        {"attn_mask": causal_lower_right(5, 9)},
        {"attn_mask": causal_upper_left(5, 9)},
    ],
)
def test_calls_are_served(arguments):
    q, k, v = qkv()
    expected = F.scaled_dot_product_attention(q, k, v, **arguments)
    with fastattn.sdpa_patch() as patch:
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, **arguments), expected)
        positional = [arguments.get("attn_mask"), 0.0, arguments.get("is_causal", False)]
        if "scale" not in arguments:
            torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, *positional), expected)
    assert patch.calls >= 1 and not patch.passed_on


def test_names_imported_before_and_within():
    early = importer("_patch_test_early")
    with fastattn.sdpa_patch() as patch:
        late = importer("_patch_test_late")
        early.attend(*qkv())
        late.attend(*qkv())
    assert patch.calls == 2
    assert early.attend is late.attend is ORIGINAL[0]
    with fastattn.sdpa_patch() as patch:
        early.attend(*qkv())
        late.attend(*qkv())
    assert patch.calls == 2 and early.attend is late.attend is ORIGINAL[0]
    del sys.modules["_patch_test_early"], sys.modules["_patch_test_late"]


def test_causal_bias_is_checked():
    q, k, v = qkv()
    with fastattn.sdpa_patch():
        with pytest.raises(ValueError, match="CausalBias of 5 x 8; the call has 5 query rows and 9 keys"):
            F.scaled_dot_product_attention(q, k, v, causal_lower_right(5, 8))
        with pytest.raises(ValueError, match="CausalBias and is_causal"):
            F.scaled_dot_product_attention(q, k, v, causal_lower_right(5, 9), is_causal=True)


def test_what_is_not_served_goes_to_torch_and_is_counted():
    q, k, v = qkv(dtype=torch.float64)
    nested = torch.nested.nested_tensor(
        [torch.randn(n, 4, 16) for n in (3, 5)], layout=torch.jagged
    ).transpose(1, 2)
    expected = F.scaled_dot_product_attention(q, k, v, causal_lower_right(5, 9))
    with fastattn.sdpa_patch() as patch:
        torch.testing.assert_close(
            F.scaled_dot_product_attention(q, k, v, causal_lower_right(5, 9)), expected
        )
        F.scaled_dot_product_attention(nested, nested, nested)
    assert patch.calls == 0
    assert patch.passed_on == {"no kernel for torch.float64": 1, "a tensor subclass": 1}
    assert "passed on to torch, 1: no kernel for torch.float64" in str(patch)


@pytest.mark.parametrize("training", [False, True])
def test_torch_modules_do_not_leave_by_their_fused_path(training):
    layer = nn.TransformerEncoderLayer(32, 4, dropout=0.0, batch_first=True).train(training)
    attention = nn.MultiheadAttention(32, 4, batch_first=True).train(training)
    x = torch.randn(2, 5, 32)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        expected = layer(x, src_key_padding_mask=padding)
        weighted = attention(x, x, x, need_weights=False)[0]
        with fastattn.sdpa_patch() as patch:
            actual = layer(x, src_key_padding_mask=padding)
            torch.testing.assert_close(attention(x, x, x, need_weights=False)[0], weighted)
    torch.testing.assert_close(actual[~padding], expected[~padding])
    assert patch.calls == 2


def test_decorator():
    @fastattn.sdpa_patch
    def bare(q, k, v):
        assert F.scaled_dot_product_attention is not ORIGINAL[0]
        return F.scaled_dot_product_attention(q, k, v)

    @fastattn.sdpa_patch()
    def called(q, k, v):
        return bare(q, k, v)

    q, k, v = qkv()
    for function in (bare, called, called):
        torch.testing.assert_close(function(q, k, v), ORIGINAL[0](q, k, v))
    assert bare.__name__ == "bare"


def test_every_thread_until_the_last_patch_is_left():
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with fastattn.sdpa_patch():
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(60)
    with fastattn.sdpa_patch() as patch:
        F.scaled_dot_product_attention(*qkv())
    assert F.scaled_dot_product_attention is not ORIGINAL[0]
    leave.set()
    thread.join()
    assert patch.calls == 1


def test_an_error_inside_takes_the_patch_away():
    with pytest.raises(KeyError), fastattn.sdpa_patch():
        raise KeyError


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_recompute_within_is_ours(reentrant):
    q, k, v = (t.requires_grad_() for t in qkv())

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    attend(q, k, v).sum().backward()
    expected = [t.grad.clone() for t in (q, k, v)]
    for t in (q, k, v):
        t.grad = None
    with fastattn.sdpa_patch() as patch:
        out = torch.utils.checkpoint.checkpoint(attend, q, k, v, use_reentrant=reentrant)
        out.sum().backward()
    assert patch.calls == 2
    for t, e in zip((q, k, v), expected):
        torch.testing.assert_close(t.grad, e)


def test_compiled_code_follows():
    graphs = []

    def backend(graph, _):
        graphs.append(str(graph.graph))
        return graph

    compiled = torch.compile(lambda q, k, v: F.scaled_dot_product_attention(q, k, v) * 2, backend=backend)
    q, k, v = qkv()
    compiled(q, k, v)
    with fastattn.sdpa_patch():
        compiled(q, k, v)
    compiled(q, k, v)
    assert ["fastattn" in graph for graph in graphs] == [False, True]
