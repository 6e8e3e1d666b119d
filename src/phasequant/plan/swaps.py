r"""Bettering a plan by exchanges, each judged by the measured KL of the model under the whole plan.

A knapsack adds up harms that were measured one by one; together they differ. So, starting from its plan, the raised
group that saves least by the measure is exchanged for the lowered one that would save most and fits, or one is added
where the budget has room; what lowers the KL stays, what does not is not tried again. Costs one pass over the measuring
tokens a try.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from phasequant.arch import Place

Bits = Mapping[Place, int]


@dataclass(frozen=True)
class Bettered:
    """The bits of every place, the KL before and after, and what was exchanged: (out, in) pairs (None: added)."""

    bits: dict[Place, int]
    before: float
    after: float
    tries: int
    exchanged: tuple[tuple[Place | None, Place], ...]


def better(
    bits: Bits,
    low: int,
    high: int,
    gain: Mapping[Place, float],
    price: Mapping[Place, float],
    budget: float,
    measure: Callable[[Bits], float],
    tries: int,
) -> Bettered:
    """Exchange groups at `high` for groups at `low`, at most `tries` times; groups at other bits stay."""
    now = dict(bits)
    before = best = measure(now)
    refused: set[tuple[Place | None, Place]] = set()
    kept: list[tuple[Place | None, Place]] = []
    done = 0
    while done < tries:
        move = _next(now, low, high, gain, price, budget, refused)
        if move is None:
            break
        out, into = move
        tried = {**now, into: high, **({out: low} if out is not None else {})}
        found = measure(tried)
        done += 1
        if found < best:
            now, best = tried, found
            kept.append(move)
        refused.add(move)
        if out is not None:
            refused.add((into, out))
    return Bettered(now, before, best, done, tuple(kept))


def _next(
    bits: Bits,
    low: int,
    high: int,
    gain: Mapping[Place, float],
    price: Mapping[Place, float],
    budget: float,
    refused: set[tuple[Place | None, Place]],
) -> tuple[Place | None, Place] | None:
    """The untried exchange that promises most: an addition that fits, else the one of least loss."""
    spent = sum(price[place] for place, b in bits.items() if b == high)
    raised = [place for place, b in bits.items() if b == high]
    lowered = [place for place, b in bits.items() if b == low]
    fitting = [(gain[p], None, p) for p in lowered if spent + price[p] <= budget and (None, p) not in refused]
    if fitting:
        _, out, into = max(fitting, key=lambda move: move[0])
        return out, into
    moves = [
        (gain[into] - gain[out], out, into)
        for out in raised
        for into in lowered
        if spent - price[out] + price[into] <= budget and (out, into) not in refused
    ]
    if not moves:
        return None
    _, out, into = max(moves, key=lambda move: move[0])
    return out, into
