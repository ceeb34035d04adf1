"""`swap(model, pack=True)`: padded batches of encoders without the padding, and encoders that must not pack."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import zoo  # noqa: E402
from test_models import assert_close, run  # noqa: E402
from transformers.models.bert.modeling_bert import BertEncoder  # noqa: E402

import fastattn  # noqa: E402
from fastattn.integrations import transformers as integration  # noqa: E402

ENCODERS = ["bert", "roberta", "albert", "distilbert", "electra"]


@pytest.fixture
def lengths(monkeypatch):
    """The lengths of the sequences that attention gets."""
    seen = []

    def attention(q, k, v, **arguments):
        seen.append(q.shape[2])
        return fastattn.attention(q, k, v, **arguments)

    monkeypatch.setattr(integration, "attention", attention)
    return seen


@pytest.mark.parametrize("name", ENCODERS)
def test_only_real_tokens_are_computed(name, lengths):
    model, x = zoo.make(name), zoo.inputs(name)
    tokens = int(x["attention_mask"].sum())
    eager = run(model, x)
    report = fastattn.swap(model, pack=True)
    assert [e.before for e in report.swapped if e.after == "packs padded batches"] == [
        {"albert": "AlbertTransformer", "distilbert": "Transformer"}.get(
            name, f"{zoo.KINDS[name].model[:-11]}Encoder"
        )
    ]
    assert_close(run(model, x), eager)
    assert set(lengths) == {tokens}
    model.train()
    if model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_close(run(model, x), eager)
    fastattn.restore(model)
    model.eval()
    assert all(torch.equal(t, eager[n]) for n, t in run(model, x).items())


def test_padding_in_the_middle_and_an_empty_sequence(lengths):
    model, x = zoo.make("bert"), zoo.inputs("bert")
    x["attention_mask"][2, 4:9] = 0
    x["attention_mask"][0] = 0
    x["labels"] = zoo._labels(x)
    eager = run(model, x)
    fastattn.swap(model, pack=True)
    ours = run(model, x)
    assert_close(ours, eager)
    assert set(lengths) == {int(x["attention_mask"].sum())}


def test_padding_comes_out_as_zero():
    model, x = zoo.make("bert").bert, zoo.inputs("bert")
    fastattn.swap(model, pack=True)
    with torch.no_grad():
        hidden = model(x["input_ids"], x["attention_mask"]).last_hidden_state
    assert (hidden[x["attention_mask"] == 0] == 0).all()


def test_what_does_not_pack_is_as_it_was(lengths):
    model, x = zoo.make("bert"), zoo.inputs("bert")
    ids, mask = x["input_ids"], x["attention_mask"]
    with torch.no_grad():
        whole, every = model(ids), model(ids, mask, output_hidden_states=True).hidden_states
        hidden = mask[:, None, None] == 0
        user = model(ids, torch.zeros(3, 1, 20, 20).masked_fill(hidden, torch.finfo().min)).logits
        fastattn.swap(model, pack=True)
        torch.testing.assert_close(
            model(ids, torch.ones_like(mask)).logits, whole.logits, rtol=1e-4, atol=1e-4
        )
        for a, b in zip(model(ids, mask, output_hidden_states=True).hidden_states, every):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        ours = model(ids, ~hidden.expand(3, 1, 20, 20)).logits
        torch.testing.assert_close(ours, user, rtol=1e-4, atol=1e-4)
    assert set(lengths) == {20}


def test_compiled_code_does_not_pack():
    model, x = zoo.make("bert"), zoo.inputs("bert")
    eager = run(model, x, backward=False)
    fastattn.swap(model, pack=True)
    torch._dynamo.reset()
    assert_close(run(torch.compile(model, fullgraph=True, backend="aot_eager"), x, backward=False), eager)


def test_a_decoder_of_the_same_classes_does_not_pack(lengths):
    model, x = zoo.make("bert", is_decoder=True), zoo.inputs("bert")
    eager = run(model, x)
    fastattn.swap(model, pack=True)
    assert_close(run(model, x), eager)
    assert set(lengths) == {20}


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_pack_and_can_be_restored(way, lengths):
    model, x = zoo.make("bert"), zoo.inputs("bert")
    fastattn.swap(model, pack=True)
    other = way(model)
    run(other, x, backward=False)
    assert set(lengths) == {int(x["attention_mask"].sum())}
    fastattn.restore(other)
    assert type(other.bert.encoder) is BertEncoder


def test_twice_is_once_and_a_dry_run_nothing():
    model = zoo.make("bert")
    planned = fastattn.swap(model, dry_run=True, pack=True)
    assert type(model.bert.encoder) is BertEncoder
    assert planned.entries == fastattn.swap(model, pack=True).entries
    made = type(model.bert.encoder)
    assert not fastattn.swap(model, pack=True).swapped and type(model.bert.encoder) is made


class Counting(BertEncoder):
    """Tells tokens apart by where they are."""

    def forward(self, hidden_states, attention_mask=None, **named):
        places = torch.arange(hidden_states.shape[1], device=hidden_states.device).view(1, -1, 1)
        return super().forward(hidden_states + places.to(hidden_states), attention_mask, **named)


def refused(model):
    (entry,) = [
        e for e in fastattn.swap(model, pack=True).left if "Encoder" in e.before or "Counting" in e.before
    ]
    return entry.reason


def test_an_encoder_that_counts_tokens_is_left():
    model = zoo.make("bert")
    model.bert.encoder.__class__ = Counting
    assert refused(model) == "packed, its layers compute something else"
    assert type(model.bert.encoder) is Counting


def test_hooks_inside_are_seen():
    model = zoo.make("bert")
    model.bert.encoder.layer[0].register_forward_hook(lambda *a: None)
    assert "hooks on modules inside (1)" in refused(model)


def test_nothing_to_pack():
    assert not fastattn.swap(nn.Sequential(nn.Linear(2, 2)), pack=True).entries
    names = {e.after for e in fastattn.swap(zoo.make("llama"), pack=True).entries}
    assert "packs padded batches" not in names
