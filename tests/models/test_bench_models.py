"""The suite `models` on a tiny model: what a row measures, compares and says."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("transformers")

from fastattn.tools import models, report, runner, workloads  # noqa: E402


def tiny(monkeypatch, name, **sizes):
    about = models.MODELS[name]
    monkeypatch.setitem(models.MODELS, name, dataclasses.replace(about, sizes=about.sizes | sizes))


def run(name, dtype="fp32", training=False):
    rows = workloads.SUITES["models"].rows
    (row,) = (r for r in rows if (r.shape.model, r.dtype, r.training) == (name, dtype, training))
    options = runner.Options(threads=(1,), budget=0.01, rivals=False)
    return runner.run_suite([row], options)


def test_the_table_and_the_models_agree():
    assert tuple(models.MODELS) == workloads.MODELS
    names = [row.name for row in workloads.SUITES["models"].rows]
    assert len(set(names)) == len(names) == 4 * len(models.MODELS)


@pytest.mark.parametrize("training", [False, True])
def test_a_row(training, monkeypatch):
    tiny(monkeypatch, "bert-base", hidden_size=32, num_attention_heads=4, intermediate_size=48)
    bench = run("bert-base", training=training)
    (row,) = bench["rows"]
    assert "failed" not in row, row
    assert set(row["times"]) == {"ours", "unpacked", "torch", "eager"}
    assert all(0 <= off < 1e-4 for off in row["differences"].values())
    assert row["swapped"]["BertEncoder -> packs padded batches"] == 1 and not row["left"]
    assert [limit["of"] for limit in row["limits"]] == ["unpacked", "ours"]
    text = report.bench_markdown(bench)
    assert "# Swapped models" in text and "| bert-base | fp32 |" in text
    assert "2 BertSelfAttention -> fastattn.attention" in text


def test_a_model_without_sdpa_is_held_to_eager(monkeypatch):
    tiny(monkeypatch, "openai-gpt", n_embd=32, n_head=4)
    (row,) = run("openai-gpt", "bf16")["rows"]
    assert "failed" not in row, row
    assert set(row["times"]) == {"ours", "eager"} and row["limits"][0]["against"] == "eager"
    assert any("attention code of its own" in reason for reason in row["left"])
