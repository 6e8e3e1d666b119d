r"""KL divergence of the whole model to its 16-bit self, one group at a time.

    kl         harm(g, b) = KL(all groups low, g at b) - min over bits      raised from all-low: what a plan really does
    kl_alone   harm(g, b) = KL(all groups in 16 bits, g at b)               lowered from 16 bits: blind to what adds up

One sweep does it for all groups: at each block every group starts a variant of the hidden states, and all variants of
earlier blocks go through the block on its common grid, stacked as a batch. So one block is resident at a time, its
variants' hidden states wait in host memory (groups × tokens × width × 4 bytes), and nothing is computed twice: about
groups/2 forwards of the tokens, and the head once for each variant. Weights and KV are in 16 bits.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack

import torch
from jaxtyping import Float
from torch import Tensor, nn

from phasequant.arch import Place
from phasequant.console import progress
from phasequant.nn import Activations, QuantLinear, in_16_bits, logits_of, set_activations
from phasequant.numerics import QuantSpec
from phasequant.observe.sweep import reading
from phasequant.ranks import Dealt
from phasequant.sensitivity.contract import Ask, Harm, Sensitivity, bits_of
from phasequant.stream import BlockStream, resident

ROWS = 4096  # tokens through a block at once
HEAD_ROWS = 256
COMMON = None, 0
Key = tuple[Place | None, int]
"""Which group differs, and the bits that it reads; `COMMON`: the state of all."""

Others = Mapping[Place, Sequence[QuantSpec | None]]
"""What single groups are put on instead."""


@torch.no_grad()
def divergences(ask: Ask, common: Activations, others: Others, title: str) -> dict[Key, float]:
    """Mean KL in nats a token of: all groups on their grids in `common`, and each group of `others` alone on each of
    its grids there."""
    with in_16_bits(ask.run.model):
        stream = BlockStream(ask.run.model, ask.map, ask.run.tokens, ask.run.device, spread=True)
        states: dict[Key, list[Tensor]] = {COMMON: list(stream.hidden)}
        for step in stream.steps(f"sensitivity ({title})"):
            arguments = stream.arguments[step.index]
            begins = states[COMMON]
            with ExitStack() as stack:
                for group in ask.map.groups:
                    own = common[step.index, group.name]
                    stack.enter_context(reading(step.block, group.linears, own and own.dynamic))
                flat = iter(
                    _through(step.block, [r for rows in states.values() for r in rows], arguments, ask.run.device)
                )
                made = {key: [next(flat) for _ in rows] for key, rows in states.items()}
                for group in ask.map.groups:
                    for spec in others.get((step.index, group.name), ()):
                        with reading(step.block, group.linears, spec and spec.dynamic):
                            found = _through(step.block, begins, arguments, ask.run.device)
                        made[(step.index, group.name), bits_of(spec)] = found
            states = made
        return _against_16_bits(ask, stream.hidden, states)


def _through(
    block: nn.Module, rows: list[Tensor], arguments: dict[str, object], device: torch.device
) -> list[Float[Tensor, "T D"]]:
    """Every sequence through a block; several at once, unless a grid is shared by a whole call."""
    shared = any(
        m.input_spec is not None and m.input_spec.granularity == "tensor"
        for m in block.modules()
        if isinstance(m, QuantLinear)
    )
    batch = 1 if shared else max(1, ROWS // len(rows[0]))
    found: list[Tensor] = []
    for at in range(0, len(rows), batch):
        y = block(torch.stack(rows[at : at + batch]).to(device), **arguments)
        found += (y[0] if isinstance(y, tuple) else y).to(rows[0].device).unbind()
    return found


def _against_16_bits(ask: Ask, exact: list[Tensor], states: dict[Key, list[Tensor]]) -> dict[Key, float]:
    norm = ask.run.model.get_submodule(ask.map.family.final_norm)
    head = ask.run.model.get_submodule(ask.map.family.head)
    total = dict.fromkeys(states, 0.0)
    count = 0

    def logs(rows: Tensor) -> Tensor:
        return logits_of(ask.run.model, ask.map, rows.to(ask.run.device)).float().log_softmax(-1)

    with resident(norm, ask.run.device), resident(head, ask.run.device), progress("logits", len(states)) as tick:
        pieces = [(s, at) for s, row in enumerate(exact) for at in range(0, len(row), HEAD_ROWS)]
        wanted = [logs(exact[s][at : at + HEAD_ROWS]).half() for s, at in pieces]
        count = sum(len(w) for w in wanted)
        for key, rows in states.items():
            for (s, at), log_p in zip(pieces, wanted, strict=True):
                p = log_p.float()
                log_q = logs(rows[s][at : at + HEAD_ROWS])
                total[key] += float((p.exp() * (p - log_q)).sum())
            tick()
    dealt = Dealt.of(len(ask.run.tokens))
    count = dealt.total(count)
    return {key: dealt.total(value) / count for key, value in total.items()}


def kl(ask: Ask) -> Sensitivity:
    """Raised from all-low."""
    begun = time.monotonic()
    low = {place: ask.at(place, ask.low) for place in ask.places}
    found = divergences(ask, low, {place: [ask.at(place, c) for c in ask.choices] for place in ask.places}, "kl")
    base = found[COMMON]
    harm: Harm = {
        place: {ask.low.bits: base, **{bits_of(c): found[place, bits_of(c)] for c in ask.choices}}
        for place in ask.places
    }
    least = {place: min(by.values()) for place, by in harm.items()}
    shifted = {place: {bits: value - least[place] for bits, value in by.items()} for place, by in harm.items()}
    return Sensitivity("kl", shifted, time.monotonic() - begun, {"all_low": base})


def kl_alone(ask: Ask) -> Sensitivity:
    """Lowered from 16 bits."""
    begun = time.monotonic()
    specs = [spec for spec in (ask.low, *ask.choices) if spec is not None]
    others = {place: [ask.at(place, spec) for spec in specs] for place in ask.places}
    found = divergences(ask, dict.fromkeys(ask.places), others, "kl, alone")
    harm = {
        place: {bits_of(s): 0.0 if s is None else found[place, s.bits] for s in (ask.low, *ask.choices)}
        for place in ask.places
    }
    return Sensitivity("kl_alone", harm, time.monotonic() - begun, {})


def measured_gains(ask: Ask, activations: Activations, raised: Collection[Place]) -> tuple[float, dict[Place, float]]:
    """KL of the model under a plan, and for each of its raised groups by how much it would be higher if this group
    alone read the low grid: what its 8 bits buy in the plan, not in theory."""
    found = divergences(ask, activations, {place: [ask.at(place, ask.low)] for place in raised}, "gains")
    return found[COMMON], {place: found[place, ask.low.bits] - found[COMMON] for place in raised}


class PlanDivergence:
    """KL of the model under whole plans, in nats a token; the 16-bit pass is run once."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        with in_16_bits(ask.run.model):
            self._exact = self._states("16 bits")

    def _states(self, title: str) -> list[Tensor]:
        ask = self.ask
        stream = BlockStream(ask.run.model, ask.map, ask.run.tokens, ask.run.device, spread=True)
        for _ in stream.steps(title):
            pass
        return stream.hidden

    @torch.no_grad()
    def __call__(self, activations: Activations) -> float:
        """The KL with every group on its grid (static ones as if they were dynamic)."""
        grids = {place: spec and spec.dynamic for place, spec in activations.items()}
        with in_16_bits(self.ask.run.model):
            set_activations(self.ask.run.model, self.ask.map, grids)
            return _against_16_bits(self.ask, self._exact, {COMMON: self._states("plan")})[COMMON]
