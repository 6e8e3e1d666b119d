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
CHANGE = 0.1  # of the peak: what counts as writing or taking back


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

    `appears` is the first block it leaves, `last` the last one. `written_by` and `taken_back_by` are the blocks that
    raise or lower its largest magnitude by more than a tenth of the peak. `times` is the largest factor over the median
    in the run; `massive` whether it meets the definition. `tokens` counts places.
    """

    channel: int
    first_token: bool
    appears: int
    last: int
    written_by: tuple[int, ...]
    taken_back_by: tuple[int, ...]
    peak: float
    times: float
    massive: bool
    tokens: tuple[tuple[str, int], ...]


def _phase(channel: int, first: bool, by_block: dict[int, list[Outlier]], blocks: int) -> Phase:
    members = [m for block in by_block.values() for m in block]
    places = {(m.sequence, m.position): m.token for m in members}
    times = max(m.times for m in members)
    peak = max((m.value for m in members), key=abs)
    appears, last = min(by_block), max(by_block)
    size = {b: max(abs(m.value) for m in found) for b, found in by_block.items()}
    steps = {b: size.get(b, 0.0) - size.get(b - 1, 0.0) for b in range(appears, min(last + 2, blocks))}
    return Phase(
        channel=channel,
        first_token=first,
        appears=appears,
        last=last,
        written_by=tuple(b for b, step in steps.items() if step > CHANGE * abs(peak)),
        taken_back_by=tuple(b for b, step in steps.items() if step < -CHANGE * abs(peak)),
        peak=peak,
        times=times,
        massive=times >= MASSIVE,
        tokens=tuple(Counter(places.values()).most_common(12)),
    )


def phases(found: list[Outlier], blocks: int) -> list[Phase]:
    """Group the outliers of a model of `blocks` blocks into phases, by how far they stand out."""
    kinds: dict[tuple[int, bool], dict[int, list[Outlier]]] = defaultdict(lambda: defaultdict(list))
    for entry in found:
        kinds[entry.channel, entry.position == 0][entry.block].append(entry)
    result = []
    for (channel, first), by_block in kinds.items():
        run: dict[int, list[Outlier]] = {}
        for block in sorted(by_block):
            if run and block - 1 not in run:
                result.append(_phase(channel, first, run, blocks))
                run = {}
            run[block] = by_block[block]
        result.append(_phase(channel, first, run, blocks))
    return sorted(result, key=lambda phase: -phase.times)
