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
Move = tuple[Place | None, Place]
"""(out, in); out None: nothing has to go."""


@dataclass(frozen=True)
class Bettered:
    """The bits of every place, the KL before and after, and what was exchanged."""

    bits: dict[Place, int]
    before: float
    after: float
    tries: int
    exchanged: tuple[Move, ...]


@dataclass(frozen=True)
class Terms:
    """Between which bits groups are exchanged, what raising each is said to save, what it costs, and what may be spent
    on those at `high`."""

    low: int
    high: int
    gain: Mapping[Place, float]
    price: Mapping[Place, float]
    budget: float


def better(bits: Bits, terms: Terms, measure: Callable[[Bits], float], tries: int) -> Bettered:
    """Exchange groups at `high` for groups at `low`, at most `tries` times; groups at other bits stay."""
    now = dict(bits)
    before = best = measure(now)
    refused: set[Move] = set()
    kept: list[Move] = []
    done = 0
    while done < tries:
        move = _next(now, terms, refused)
        if move is None:
            break
        out, into = move
        tried = {**now, into: terms.high, **({out: terms.low} if out is not None else {})}
        found = measure(tried)
        done += 1
        if found < best:
            now, best = tried, found
            kept.append(move)
        refused.add(move)
        if out is not None:
            refused.add((into, out))
    return Bettered(now, before, best, done, tuple(kept))


def _next(bits: Bits, terms: Terms, refused: set[Move]) -> Move | None:
    """The untried exchange that promises most: an addition that fits, else the one of least loss."""
    gain, price = terms.gain, terms.price
    raised = [place for place, b in bits.items() if b == terms.high]
    lowered = [place for place, b in bits.items() if b == terms.low]
    room = terms.budget - sum(price[place] for place in raised)
    moves: list[tuple[float, Move]] = [(gain[p], (None, p)) for p in lowered if price[p] <= room]
    moves = [move for move in moves if move[1] not in refused] or [
        (gain[into] - gain[out], (out, into))
        for out in raised
        for into in lowered
        if price[into] - price[out] <= room and (out, into) not in refused
    ]
    return max(moves, key=lambda move: move[0])[1] if moves else None
