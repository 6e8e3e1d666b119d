r"""Massive activations: a few numbers of the residual stream thousands of times larger than the rest.

A hidden value h stands out by the factor f = |h| / median|h|, the median over the hidden state that it is part of: all
tokens and channels of one sequence at one depth. It is

    massive    |h| > 100 and f ≥ 1000     the definition (arXiv 2503.22329, Eq 1, after Sun et al., arXiv 2402.17762)
    large      |h| > 100 and f ≥ 100      below the definition, and enough to coarsen a shared 4-bit grid to nothing

They are born in one block, ride the residual unchanged, and are taken back in a later one: a *phase*, the run of blocks
through which one channel stands out on the same kind of token.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

LEAST = 100.0
MASSIVE = 1000.0
LARGE = 100.0


def outstanding(hidden: Float[Tensor, "T D"], times: float = MASSIVE) -> Bool[Tensor, "T D"]:
    """Which values of one sequence's hidden state exceed 100 and `times` its median."""
    size = hidden.abs()
    return (size > LEAST) & (size >= times * size.median())


@dataclass(frozen=True)
class Outlier:
    """One value that stands out in the residual that leaves `block`; `times` the median of its hidden state."""

    block: int
    sequence: int
    position: int
    token: str
    channel: int
    value: float
    times: float


@dataclass(frozen=True)
class Phase:
    """A run of blocks after each of which `channel` stands out, on the first token or on others.

    `appears` is the block that writes it, `last` the last one it leaves; block `last + 1` takes it back. `times` is the
    largest factor over the median in the run; `massive` whether it meets the definition. `tokens` counts places.
    """

    channel: int
    first_token: bool
    appears: int
    last: int
    peak: float
    times: float
    massive: bool
    tokens: tuple[tuple[str, int], ...]


def _phase(channel: int, first: bool, run: list[int], members: list[Outlier]) -> Phase:
    places = {(m.sequence, m.position): m.token for m in members}
    times = max(m.times for m in members)
    return Phase(
        channel=channel,
        first_token=first,
        appears=run[0],
        last=run[-1],
        peak=max((m.value for m in members), key=abs),
        times=times,
        massive=times >= MASSIVE,
        tokens=tuple(Counter(places.values()).most_common(12)),
    )


def phases(found: list[Outlier]) -> list[Phase]:
    """Group outliers into phases, by how far they stand out."""
    runs: dict[tuple[int, bool], dict[int, list[Outlier]]] = defaultdict(lambda: defaultdict(list))
    for entry in found:
        runs[entry.channel, entry.position == 0][entry.block].append(entry)
    result = []
    for (channel, first), by_block in runs.items():
        run: list[int] = []
        for block in sorted(by_block):
            if run and block != run[-1] + 1:
                result.append(_phase(channel, first, run, [m for b in run for m in by_block[b]]))
                run = []
            run.append(block)
        result.append(_phase(channel, first, run, [m for b in run for m in by_block[b]]))
    return sorted(result, key=lambda phase: -phase.times)
