r"""Massive activations: a few numbers of the residual stream thousands of times larger than the rest.

A hidden value h is massive iff |h| > 100 and |h| ≥ 1000 · median|h|, the median over the hidden state that it is part
of: all tokens and channels of one sequence at one depth (arXiv 2503.22329, Eq 1, after Sun et al., arXiv 2402.17762). They are born in one block, ride the residual unchanged, and are taken back in
a later one: a *phase*, the run of blocks through which one channel is massive.
"""

from collections import defaultdict
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

LEAST = 100.0
TIMES_MEDIAN = 1000.0


def massive(hidden: Float[Tensor, "T D"]) -> Bool[Tensor, "T D"]:
    """Which values of one sequence's hidden state are massive."""
    size = hidden.abs()
    return (size > LEAST) & (size >= TIMES_MEDIAN * size.median())


@dataclass(frozen=True)
class Massive:
    """One massive value in the residual that leaves `block`."""

    block: int
    sequence: int
    position: int
    token: str
    channel: int
    value: float


@dataclass(frozen=True)
class Phase:
    """A run of blocks after each of which `channel` is massive, on the first token or on others.

    `appears` is the block that writes it, `last` the last one it leaves; block `last + 1` takes it back.
    """

    channel: int
    first_token: bool
    appears: int
    last: int
    peak: float
    tokens: tuple[tuple[str, int], ...]


def phases(found: list[Massive]) -> list[Phase]:
    """Group massive values into phases, largest first; tokens by how often they carry one."""
    runs: dict[tuple[int, bool], dict[int, list[Massive]]] = defaultdict(lambda: defaultdict(list))
    for entry in found:
        runs[entry.channel, entry.position == 0][entry.block].append(entry)
    result = []
    for (channel, first), by_block in runs.items():
        run: list[int] = []
        for block in [*sorted(by_block), None]:
            if run and (block is None or block != run[-1] + 1):
                members = [entry for b in run for entry in by_block[b]]
                places = {(e.sequence, e.position): e.token for e in members}
                counts: dict[str, int] = defaultdict(int)
                for token in places.values():
                    counts[token] += 1
                peak = max((e.value for e in members), key=abs)
                ranked = tuple(sorted(counts.items(), key=lambda item: -item[1])[:12])
                result.append(Phase(channel, first, run[0], run[-1], peak, ranked))
                run = []
            if block is not None:
                run.append(block)
    return sorted(result, key=lambda phase: -abs(phase.peak))
