"""Swapped models beside eager: outputs, loss, gradients, caches, masks; and that these tests can fail."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import transformers  # noqa: E402
import zoo  # noqa: E402
from transformers import masking_utils  # noqa: E402

import fastattn  # noqa: E402
from fastattn import masks  # noqa: E402
from fastattn.integrations import model_masks  # noqa: E402
from fastattn.integrations import transformers as integration  # noqa: E402

transformers.logging.set_verbosity_error()
ATTENDING = [name for name, kind in zoo.KINDS.items() if kind.attention]
# Models whose only input is text: any padding may be asked of them.
DECODERS_AND_ENCODERS = [n for n in ATTENDING if zoo.KINDS[n].inputs is zoo._text]
# Differences of float32 rounding stay below this share of the largest number; a fault is a hundred times that.
SHARE = 1e-4
SDPA_MASK = masking_utils.sdpa_mask


def run(model, x, backward=True):
    """The answer, the loss and the gradients of all parameters that have any."""
    model.zero_grad()
    out = model(**x)
    results = {"answer": zoo.answer(out, x).detach(), "loss": out["loss"].detach()}
    if backward:
        out["loss"].backward()
        results |= {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return results


def distance(actual, expected):
    """The largest difference as a share of the largest number."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def assert_close(actual, expected, share=SHARE):
    assert actual.keys() == expected.keys()
    # Gradients that are 0 but for rounding (of key biases) are judged by the others' size.
    scale = (
        max(v.abs().max().item() for n, v in expected.items() if n not in ("answer", "loss"))
        if len(expected) > 2
        else 0
    )
    for name, e in expected.items():
        worst = (actual[name] - e).abs().max().item()
        allowed = share * max(e.abs().max().item(), 1e-2 * scale)
        assert worst <= allowed, f"{name}: {worst:.2e} > {allowed:.2e}"


def assert_apart(actual, expected):
    """That a fault shows in the answer, the loss and the gradients."""
    assert distance(actual["answer"], expected["answer"]) > 100 * SHARE
    assert distance(actual["loss"], expected["loss"]) > SHARE
    gradients = [n for n in expected if n in actual and n not in ("answer", "loss")]
    size = max(expected[n].abs().max().item() for n in gradients)
    assert max((actual[n] - expected[n]).abs().max().item() for n in gradients) > 100 * SHARE * size


def altered(monkeypatch, change):
    """Makes the integration call attention with altered arguments."""

    def attention(q, k, v, **arguments):
        q, k, v, arguments = change(q, k, v, arguments)
        return fastattn.attention(q, k, v, **arguments)

    monkeypatch.setattr(integration, "attention", attention)


@pytest.mark.parametrize("name", zoo.KINDS)
def test_outputs_loss_and_gradients(name):
    model, x = zoo.make(name), zoo.inputs(name)
    eager = run(model, x)
    report = fastattn.swap(model)
    attention = [e for e in report.swapped if e.after == "fastattn.attention"]
    assert len(attention) == zoo.KINDS[name].attention
    norms = [e for e in report.swapped if "Norm" in e.before]
    assert norms and not [e for e in report.left if "Norm" in e.before]
    assert bool(report.left) == (not attention)
    assert all(e.reason.startswith("attention code of its own") for e in report.left)
    assert_close(run(model, x), eager)
    again = fastattn.swap(model)
    assert not again.swapped and sum(e.already for e in again.entries) == len(report.swapped)
    assert_close(run(model, x), eager)
    fastattn.restore(model)
    assert model.config._attn_implementation == "eager"
    again = run(model, x)
    assert all(torch.equal(again[n], e) for n, e in eager.items())


@pytest.mark.parametrize("name", zoo.KINDS)
def test_bfloat16_is_as_near_to_float32_as_eager_is(name):
    model, x = zoo.make(name), zoo.inputs(name)
    model.bfloat16().float()  # the numbers that bfloat16 has
    exact = run(model, x)
    model.bfloat16()
    x = {n: t.bfloat16() if torch.is_tensor(t) and t.is_floating_point() else t for n, t in x.items()}
    eager = run(model, x)
    fastattn.swap(model)
    ours = run(model, x)
    scale = max(e.abs().max() for n, e in exact.items() if n != "answer")
    for n, e in exact.items():
        near, nearer = ((r[n].float() - e).abs().max().item() for r in (ours, eager))
        assert near <= 1.5 * nearer + 0.01 * (e.abs().max() if n == "answer" else scale), n


@pytest.mark.parametrize("name", [n for n in ATTENDING if zoo.KINDS[n].masked])
def test_a_dropped_mask_shows(name, monkeypatch):
    model, x = zoo.make(name), zoo.inputs(name)
    eager = run(model, x)
    fastattn.swap(model)
    altered(monkeypatch, lambda q, k, v, a: (q, k, v, a | {"mask": None}))
    assert_apart(run(model, x), eager)


@pytest.mark.parametrize("name", ATTENDING)
def test_a_wrong_head_shows(name, monkeypatch):
    model, x = zoo.make(name), zoo.inputs(name)
    eager = run(model, x)
    fastattn.swap(model)
    altered(monkeypatch, lambda q, k, v, a: (q, k.roll(1, 1), v.roll(1, 1), a))
    assert_apart(run(model, x), eager)


@pytest.mark.parametrize(
    "name, keyword", [("gemma2", "softcap"), ("gpt-oss", "sinks"), ("t5", "bias"), ("t5", "scale")]
)
def test_a_dropped_keyword_shows(name, keyword, monkeypatch):
    model, x = zoo.make(name), zoo.inputs(name)
    eager = run(model, x)
    fastattn.swap(model)
    altered(monkeypatch, lambda q, k, v, a: (q, k, v, a | {keyword: None}))
    assert_apart(run(model, x), eager)


@pytest.fixture
def no_dense_mask(monkeypatch):
    """A mask of size S x S is an error."""

    def refuse(*arguments, **keywords):
        raise AssertionError("an S x S mask was made")

    monkeypatch.setattr(masking_utils, "sdpa_mask", refuse)
    monkeypatch.setattr(model_masks.ModelMask, "dense", refuse)


@pytest.mark.parametrize("name", ATTENDING)
def test_no_model_makes_a_dense_mask(name, no_dense_mask):
    model, x = zoo.make(name), zoo.inputs(name)
    fastattn.swap(model)
    run(model, x, backward=False)


class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the results of operators that have S rows and S columns."""

    def __init__(self, S):
        super().__init__()
        self.S, self.found = S, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and list(t.shape).count(self.S) > 1:
                self.found.append((str(function), tuple(t.shape)))
        return out


@pytest.mark.parametrize("name", ["bert", "llama", "mistral", "gemma2", "gpt-oss"])
def test_nothing_of_size_s_by_s_at_all(name):
    S = 149
    model = zoo.make(name, max_position_embeddings=256)
    x = zoo._tokens(S)
    with torch.no_grad(), Sizes(S) as eager:
        model(**x)
    fastattn.swap(model)
    with torch.no_grad(), Sizes(S) as ours:
        model(**x)
    assert eager.found and not ours.found


# gpt-oss does not tell its masks of position_ids: packed, it sees across sequences in eager attention too.
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "qwen3", "gemma2"])
def test_packed_sequences(name, no_dense_mask, monkeypatch):
    model = zoo.make(name)
    ids = torch.randint(3, 97, (1, 20))
    lengths = (5, 12, 3)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    x = dict(input_ids=ids, position_ids=positions, labels=ids, use_cache=False)
    with monkeypatch.context() as theirs:
        theirs.setattr(masking_utils, "sdpa_mask", SDPA_MASK)
        eager = run(model, x)
    fastattn.swap(model)
    packed = run(model, x)
    assert_close(packed, eager)
    with torch.no_grad():
        apart = [model(input_ids=part, use_cache=False).logits for part in ids.split(lengths, 1)]
    assert distance(packed["answer"], torch.cat(apart, 1)) < SHARE
    altered(monkeypatch, lambda q, k, v, a: (q, k, v, a | {"mask": masks.Causal()}))
    assert_apart(run(model, x), eager)


@pytest.mark.parametrize("kind", ["bool, one for all items", "float", "float, one head each"])
@pytest.mark.parametrize("name", DECODERS_AND_ENCODERS)
def test_masks_of_the_user(name, kind):
    model, x = zoo.make(name), zoo.inputs(name)
    visible = torch.rand(20, 20, generator=torch.Generator().manual_seed(5)) < 0.4
    visible |= torch.eye(20, dtype=torch.bool)
    additive = torch.zeros(20, 20).masked_fill(~visible, torch.finfo(torch.float32).min)
    eager_mask = additive.expand(3, 1, 20, 20)
    mask = visible.expand(3, 1, 20, 20) if kind.startswith("bool") else eager_mask
    if kind.endswith("each"):
        tilt = torch.randn(3, 4, 20, 20, generator=torch.Generator().manual_seed(6))
        mask = eager_mask = additive + tilt
    x = {"input_ids": x["input_ids"], "labels": x["input_ids"]}
    eager = run(model, x | {"attention_mask": eager_mask})
    whole = run(model, x | {"attention_mask": torch.zeros_like(eager_mask)})
    fastattn.swap(model)
    assert_close(run(model, x | {"attention_mask": mask}), eager)
    assert_apart(whole, eager)


def test_a_mask_of_the_user_is_read_once(monkeypatch):
    model, x = zoo.make("bert"), zoo.inputs("bert")
    calls = []
    prepare = integration.masks.prepare
    monkeypatch.setattr(integration.masks, "prepare", lambda *a: calls.append(a) or prepare(*a))
    fastattn.swap(model)
    mask = x["attention_mask"].bool()[:, None, None, :].expand(3, 1, 20, 20)
    with torch.no_grad():
        first = model(input_ids=x["input_ids"], attention_mask=mask).logits
        assert len(calls) == 1, "once, not once a layer"
        torch.testing.assert_close(first[0, :5], model(**x).logits[0, :5])
    mask = mask.clone()
    with torch.no_grad():
        model(input_ids=x["input_ids"], attention_mask=mask)
        mask[:, :, :, 3] = False
        changed = model(input_ids=x["input_ids"], attention_mask=mask).logits
    assert distance(changed, first) > 100 * SHARE, "a mask changed in place is read again"


GENERATING = ["gpt2", "llama", "mistral", "qwen3", "gemma2", "gpt-oss", "t5", "whisper"]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", GENERATING)
def test_generate(name, cache, no_dense_mask, monkeypatch):
    model, x = zoo.make(name), zoo.inputs(name)
    if name == "whisper":
        prompt = {"input_features": x["input_features"]}
    else:
        prompt = {n: x[n] for n in ("input_ids", "attention_mask")}
        prompt = {n: t[1:] for n, t in prompt.items()}  # padded on the left, or not at all
    arguments = dict(max_new_tokens=9, min_new_tokens=9, do_sample=False, pad_token_id=0)
    if cache == "static":
        arguments |= dict(cache_implementation="static", disable_compile=True)
    with monkeypatch.context() as theirs:
        theirs.setattr(masking_utils, "sdpa_mask", SDPA_MASK)
        eager = model.generate(**prompt, **arguments)
    fastattn.swap(model)
    assert torch.equal(model.generate(**prompt, **arguments), eager)


@pytest.mark.parametrize("name", zoo.KINDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name, reentrant):
    model, x = zoo.make(name), zoo.inputs(name)
    if not model.supports_gradient_checkpointing:
        pytest.skip(f"{type(model).__name__} has no gradient checkpointing")
    model.train()  # there is no dropout; BigBird draws other blocks
    eager = run(model, x)
    fastattn.swap(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_close(run(model, x), eager)


COMPILED = {"bert", "mistral"}


def compiled(name, x, backend="aot_eager"):
    """The results of a swapped model that was compiled whole, and those in eager attention."""
    model = zoo.make(name)
    if getattr(model, "loss_type", "") is None:
        model.loss_type = "ForCausalLM"  # what it falls back to with a warning, which Dynamo cannot trace
    if name == "gpt-oss":
        model.set_experts_implementation("batched_mm")  # 5.17's grouped one has no backward that compiles
    eager = run(model, x)
    fastattn.swap(model)
    torch._dynamo.reset()
    ours = run(torch.compile(model, fullgraph=True, backend=backend), x)
    return {n.removeprefix("_orig_mod."): t for n, t in ours.items()}, eager


@pytest.mark.parametrize("padding", ["none", "sides", "gaps"])
@pytest.mark.parametrize(
    "name", [n if n in COMPILED else pytest.param(n, marks=pytest.mark.slow) for n in DECODERS_AND_ENCODERS]
)
def test_compiled_whole(name, padding):
    x = zoo.inputs(name)
    if padding == "none":
        x["attention_mask"][:] = 1
    elif padding == "gaps":
        x["attention_mask"][2, 5:9] = 0
        x["labels"] = zoo._labels(x)
    assert_close(*compiled(name, x))


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in ATTENDING if n not in DECODERS_AND_ENCODERS])
def test_other_models_compiled_whole(name):
    assert_close(*compiled(name, zoo.inputs(name)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "mistral"])
def test_compiled_by_inductor(name):
    assert_close(*compiled(name, zoo.inputs(name), "inductor"))


@pytest.mark.parametrize("name", ["bert", "llama", "gemma2", "gpt-oss"])
def test_attention_weights(name):
    model, x = zoo.make(name), zoo.inputs(name)
    real = x["attention_mask"].bool()[:, None, :, None]
    with torch.no_grad():
        eager = model(**x, output_attentions=True).attentions
        fastattn.swap(model)
        ours = model(**x, output_attentions=True).attentions
    assert len(ours) == len(eager) == 2
    for a, e in zip(ours, eager):
        assert a.shape == e.shape
        torch.testing.assert_close(a * real, e * real, rtol=1e-4, atol=1e-5)


def test_unknown_keywords_raise():
    model, x = zoo.make("llama"), zoo.inputs("llama")
    fastattn.swap(model)
    with pytest.raises(NotImplementedError, match="LlamaAttention passes secret_bias to its attention"):
        model(**x, secret_bias=torch.ones(1))
