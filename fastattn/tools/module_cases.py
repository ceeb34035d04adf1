"""A row of the suite `modules` as callables: fastattn.nn's module beside each of torch's ways to run its own.

Both sides have the same parameters and are given the same padded batch and bool padding mask, and both give a padded
batch back: nested tensors are made and unmade inside the time. They leave out the rows of padded queries, which the
masked call has to give, so nested is compared with nested.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .cases import Case, _generator
from .families import padding_lengths
from .workloads import MODULE_OPS, Workload


@contextmanager
def _slow_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _module(row: Workload) -> torch.nn.Module:
    """torch's module of a row, in its dtype, with weights by the row's name."""
    width, heads = row.shape.hq * row.shape.d, row.shape.hq
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(_generator(row).initial_seed())
        if row.op == "mha":
            module = torch.nn.MultiheadAttention(width, heads, batch_first=True)
        else:
            layer = torch.nn.TransformerEncoderLayer(
                width, heads, 4 * width, activation="gelu", batch_first=True
            )
            module = (
                layer if row.op == "encoder-layer" else torch.nn.TransformerEncoder(layer, MODULE_OPS[row.op])
            )
    return module.to(row.torch_dtype).train(row.training)


def build(row: Workload, device: str = "cpu") -> Case:
    """The callables of one row; in training, forward and backward to the input and every parameter."""
    from fastattn import nn

    shape = row.shape
    theirs = _module(row).to(device)
    ours = getattr(nn, type(theirs).__name__).from_torch(theirs)
    lengths = padding_lengths(shape, 50)
    padding = (torch.arange(shape.sq) >= torch.tensor(lengths)[:, None]).to(device)
    x = torch.randn(shape.b, shape.sq, shape.hq * shape.d, generator=_generator(row)).to(
        device, row.torch_dtype
    )

    def call(module: torch.nn.Module) -> Callable[[], Tensor]:
        if row.op == "mha":
            return lambda: module(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        return lambda: module(x, src_key_padding_mask=padding)

    def slowly():
        with _slow_path():
            return call(theirs)()

    def nested(module: torch.nn.Module) -> Callable[[], Tensor]:
        def call():
            y = torch.nested.nested_tensor([x[n, :length] for n, length in enumerate(lengths)])
            y = module(y, y, y, need_weights=False)[0]
            return torch.nested.to_padded_tensor(y, 0.0, tuple(x.shape))

        return call

    variants: dict[str, Callable[[], Any]] = {"ours": call(ours), "torch": call(theirs)}
    if row.training:
        parameters = [x.requires_grad_(), *theirs.parameters()]
        dy = torch.randn(x.shape, generator=_generator(row)).to(x)
        variants = {name: _trained(forward, parameters, dy) for name, forward in variants.items()}
    else:
        variants["torch slow path"] = slowly
        if row.op == "mha":
            variants |= {"torch nested": nested(theirs), "ours nested": nested(ours)}
    return Case(row, variants, {"x": x, "padding": padding, "ours": ours, "theirs": theirs})


def _trained(forward: Callable[[], Tensor], needs: list[Tensor], dy: Tensor) -> Callable[[], Any]:
    def forward_and_backward():
        with torch.enable_grad():
            return torch.autograd.grad(forward(), needs, dy)

    return forward_and_backward
