"""A short list of cases in which every pair of values of two factors occurs: grids that stay quick."""

from __future__ import annotations

import itertools
import random


def pairwise(**factors: tuple) -> list[dict]:
    """Cases, dicts of one value a factor, greedily chosen and always the same, until every pair was met."""
    draw = random.Random(0)
    names = list(factors)
    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x in range(len(factors[a]))
        for y in range(len(factors[b]))
    }
    cases = []
    while missing:
        seed = dict(draw.choice(sorted(missing)))
        best, most = None, -1
        for _ in range(30):
            case = {n: seed.get(n, draw.randrange(len(factors[n]))) for n in names}
            met = sum(pair in missing for pair in itertools.combinations(case.items(), 2))
            if met > most:
                best, most = case, met
        missing -= set(itertools.combinations(best.items(), 2))
        cases.append({n: factors[n][v] for n, v in best.items()})
    return cases


def name_of(case: dict) -> str:
    """The same in every process: a function shows its name, not its address."""
    shown = {n: getattr(v, "__name__", v) if callable(v) else v for n, v in case.items() if v}
    return "-".join(v if isinstance(v, str) and v == case[n] else f"{n}={v}" for n, v in shown.items())
