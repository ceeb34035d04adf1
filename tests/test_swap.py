"""`swap` and `restore`: what is replaced, what is left and why, and that everything comes back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastattn.recognise import Norm, is_candidate, recognise


class Llama(nn.Module):
    """RMSNorm as Llama has it: rounds before the weight, the result in the wider dtype."""

    def __init__(self, n=32, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)


class Gemma(nn.Module):
    """RMSNorm as Gemma has it: the weight is an offset from 1."""

    def __init__(self, n=32, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(n))

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.float())).type_as(x)


class CalledRMSNorm(Llama):
    """Named like one, but no RMSNorm: the absolute mean."""

    def forward(self, hidden_states):
        return (
            self.weight * hidden_states / (hidden_states.abs().mean(-1, keepdim=True) + self.variance_epsilon)
        )


class FixedEpsRMSNorm(Llama):
    """Does not follow its eps attribute."""

    def forward(self, hidden_states):
        x = hidden_states
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class GatedRMSNorm(Llama):
    def forward(self, hidden_states, gate=None):
        return super().forward(hidden_states) * (1 if gate is None else gate)


class OwnForward(nn.LayerNorm):
    def forward(self, input):
        return super().forward(input) + 1


class Plain(nn.LayerNorm):
    """A subclass that changes nothing of importance."""


@pytest.mark.parametrize(
    "module, expected",
    [
        (Llama(), Norm("rms_norm", "variance_epsilon", 0.0, "hidden_states", (True, False))),
        (Gemma(), Norm("rms_norm", "eps", 1.0, "x", (False, False))),
        (CalledRMSNorm(), "neither RMSNorm nor LayerNorm"),
        (FixedEpsRMSNorm(), "neither RMSNorm nor LayerNorm"),
        (GatedRMSNorm(), "not one tensor"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_norms_are_known_by_what_they_compute(module, expected):
    before = {n: p.clone() for n, p in module.named_parameters()}
    state = torch.get_rng_state()
    assert is_candidate(module)
    found = recognise(module)
    assert found == expected if isinstance(expected, Norm) else expected in found
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_modules_that_are_no_norms_are_not_run():
    for module in (
        nn.BatchNorm1d(4),
        nn.Linear(4, 4),
        nn.Dropout(0.1),
        nn.GroupNorm(2, 4),
        nn.Embedding(4, 4),
    ):
        assert not is_candidate(module)
