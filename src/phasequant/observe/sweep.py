"""One streaming sweep over a model: every metric of this room, block by block, one block resident.

Works on the raw model and on a transformed one alike, so that the same numbers are had before and after a transform:
the residual of a rotated model is the rotated residual, and a linear's input is taken where its quantizer stands, after
what runs online. Costs one forward of the calibration sequences (default 20 × 512 tokens, DynamicPTQ §4.7) plus, if
`noise` is asked for, one block forward a group on the first sequences.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phasequant.arch import ModelMap
from phasequant.nn import QuantLinear, prepared
from phasequant.numerics import QuantSpec
from phasequant.observe.gsr import gsr
from phasequant.observe.massive import LARGE, Outlier, outstanding, phases
from phasequant.observe.noise import relative_noise
from phasequant.observe.observations import Curve, GroupStats, Observations, SpikeMap, SpikeRow, TokenMap
from phasequant.observe.residual import historical_snr, jump_ratio
from phasequant.observe.spikes import spike_ratio, token_absmax
from phasequant.ranks import Dealt, everyones
from phasequant.stream import BlockStream, Step

BITS = (4, 8)
NOISE_SEQUENCES = 4
MAP_TOKENS = 48
KEEP_PHASES = 64
KEEP_OUTLIERS = 512  # the strongest: a rotated residual spreads one massive value over every channel
MAP_SEQUENCES = 4
SPIKE_SEQUENCES = 32


def _mean(curve: Curve, values: Tensor) -> None:
    """Append the means of `values` (sequences, T)."""
    curve.all_tokens.append(float(values.mean()))
    curve.without_first.append(float(values[:, 1:].mean()))


class _Inputs:
    """Hooks on a block's linears that keep, for each group, per-token statistics of what its quantizer sees."""

    def __init__(self, block: nn.Module, model_map: ModelMap) -> None:
        self.gsr: dict[str, list[Tensor]] = {g.name: [] for g in model_map.groups}
        self.absmax: dict[str, list[Tensor]] = {g.name: [] for g in model_map.groups}
        self.peak: dict[str, tuple[float, int]] = {g.name: (-1.0, 0) for g in model_map.groups}
        self._hooks = [
            block.get_submodule(group.input).register_forward_pre_hook(
                self._keeper(group.name, model_map.rows_seen(group.name))
            )
            for group in model_map.groups
        ]

    def _keeper(self, group: str, rows: int) -> Any:
        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].flatten(0, -2)  # one sequence at a time; some blocks drop its axis before the MLP
            x = prepared(module, x).to(torch.float32)
            self.gsr[group].append(gsr(x))
            self.absmax[group].append(token_absmax(x, rows))
            absmax = token_absmax(x)
            row = int(absmax.argmax())
            if float(absmax[row]) > self.peak[group][0]:
                self.peak[group] = float(absmax[row]), int(x[row].abs().argmax())

        return keep

    def close(self, dealt: Dealt) -> None:
        """Take the hooks off; take in what other ranks have seen."""
        for hook in self._hooks:
            hook.remove()
        if dealt.step > 1:
            self.gsr = {group: dealt.ordered(rows) for group, rows in self.gsr.items()}
            self.absmax = {group: dealt.ordered(rows) for group, rows in self.absmax.items()}
            seen = everyones(self.peak)
            self.peak = {group: max((one[group] for one in seen), key=lambda peak: peak[0]) for group in self.peak}


def _weight(linear: nn.Module) -> Tensor:
    return linear.dense_weight() if isinstance(linear, QuantLinear) else linear.get_parameter("weight")


def _group_stats(step: Step, model_map: ModelMap, inputs: _Inputs) -> list[GroupStats]:
    stats = []
    for group in model_map.groups:
        ratios = torch.stack(inputs.gsr[group.name])
        absmax = torch.stack(inputs.absmax[group.name])
        weights = [gsr(_weight(step.block.get_submodule(name)).to(torch.float32)) for name in group.linears]
        stats.append(
            GroupStats(
                block=step.index,
                group=group.name,
                gsr=float(ratios.mean()),
                gsr_p99=float(ratios.flatten().quantile(0.99)),
                gsr_weight=float(torch.cat(weights).mean()),
                absmax=float(absmax.max()),
                spike_ratio=spike_ratio(absmax),
            )
        )
    return stats


@contextmanager
def reading(block: nn.Module, linears: tuple[str, ...], spec: QuantSpec | None) -> Iterator[None]:
    """Let some linears of a transformed block read their input on a grid, for a while."""
    modules = [m for m in map(block.get_submodule, linears) if isinstance(m, QuantLinear)]
    before = [module.input_spec for module in modules]
    try:
        for module in modules:
            module.input_spec = spec
        yield
    finally:
        for module, kept in zip(modules, before, strict=True):
            module.input_spec = kept


def _measure_noise(
    step: Step, model_map: ModelMap, grids: dict[str, QuantSpec], stats: list[GroupStats], dealt: Dealt
) -> None:
    clean = [y for _, y in step.probe(NOISE_SEQUENCES)]
    for group, entry in zip(model_map.groups, stats, strict=True):
        for name, spec in grids.items():
            with reading(step.block, group.linears, spec.dynamic):
                noisy = [y for _, y in step.probe(NOISE_SEQUENCES)]
            own = [relative_noise(a, b) for a, b in zip(noisy, clean, strict=True)]
            values = dealt.ordered(own, NOISE_SEQUENCES)
            entry.noise[name] = float(torch.cat(values).median())


class _TokenMaps:
    """Absmax of the residual by depth, for the tokens of the first sequences that stand out most at any depth."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def add(self, absmax: list[Tensor]) -> None:
        self.rows.append(torch.stack(absmax[:MAP_SEQUENCES]).cpu())

    def result(self, tokens: Tensor, tokenizer: PreTrainedTokenizerBase | None) -> TokenMap:
        stacked = torch.stack(self.rows)  # (depth, sequences, T)
        typical = stacked.flatten(1).median(-1).values.clamp(min=1e-20)
        score = (stacked / typical[:, None, None]).amax(0)
        best = score.flatten().topk(min(MAP_TOKENS, score.numel())).indices.sort().values
        places = [(int(i) // score.shape[1], int(i) % score.shape[1]) for i in best]
        return TokenMap(
            tokens=[token_text(int(tokens[s, t]), tokenizer) for s, t in places],
            places=places,
            absmax=[[float(f"{stacked[d, s, t]:.4g}") for s, t in places] for d in range(len(self.rows))],
        )


class _SpikeMaps:
    """Token-wise absmax of every group's input, for the tokens of the first sequences that dominate any most."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, str, int, Tensor]] = []

    def add(self, block: int, inputs: _Inputs) -> None:
        for group, rows in inputs.absmax.items():
            absmax = torch.stack(rows[:SPIKE_SEQUENCES]).cpu()
            times = absmax / absmax.median(-1, keepdim=True).values.clamp(min=1e-20)
            self.rows.append((block, group, inputs.peak[group][1], times))

    def result(self, tokens: Tensor, tokenizer: PreTrainedTokenizerBase | None) -> SpikeMap:
        score = torch.stack([times for *_, times in self.rows]).amax(0)
        best = score.flatten().topk(min(MAP_TOKENS, score.numel())).indices.sort().values
        places = [(int(i) // score.shape[1], int(i) % score.shape[1]) for i in best]
        return SpikeMap(
            tokens=[token_text(int(tokens[s, t]), tokenizer) for s, t in places],
            places=places,
            rows=[
                SpikeRow(block, group, channel, [float(f"{times[s, t]:.4g}") for s, t in places])
                for block, group, channel, times in self.rows
            ],
        )


class _State(NamedTuple):
    """One sequence's hidden state at one depth: norm and absmax by token, the largest value and its channel."""

    norm: Tensor
    absmax: Tensor
    peak: tuple[float, int]
    outliers: list[Outlier]


def _state(
    h: Float[Tensor, "T D"], block: int, sequence: int, ids: Tensor, tokenizer: PreTrainedTokenizerBase | None
) -> _State:
    peak = int(h.abs().argmax())
    median = float(h.abs().median())
    outliers = []
    for position, channel in outstanding(h, LARGE).nonzero().tolist():
        value = float(h[position, channel])
        text, times = token_text(int(ids[position]), tokenizer), round(abs(value) / median, 1)
        outliers.append(Outlier(block, sequence, position, text, channel, value, times))
    return _State(h.norm(dim=-1), token_absmax(h), (float(h.flatten()[peak].abs()), peak % h.shape[-1]), outliers)


def token_text(token: int, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """A token as a person reads it."""
    return str(token) if tokenizer is None else tokenizer.decode([token])


@torch.no_grad()
def sweep(
    model: PreTrainedModel,
    model_map: ModelMap,
    tokens: Int[Tensor, "sequences T"],
    *,
    coordinates: str = "raw",
    tokenizer: PreTrainedTokenizerBase | None = None,
    noise: dict[str, QuantSpec] | None = None,
    device: torch.device | None = None,
) -> Observations:
    """Observe a model on `tokens`. `noise`: grids (by name) whose effect is measured group by group; transformed models
    only."""
    stream = BlockStream(model, model_map, tokens, device, spread=True)
    dealt = stream.dealt
    found = Observations(coordinates, model_map.shape.blocks, tokens.shape[0], tokens.shape[1])
    found.snr = {str(bits): Curve() for bits in BITS}
    maps, spikes = _TokenMaps(), _SpikeMaps()
    outliers: list[Outlier] = []

    def depth(hidden: list[Tensor], block: int) -> None:
        """Notes on the stream after `block` (-1: the embedding)."""
        own = [
            _state(h.to(torch.float32), block, i, tokens[i], tokenizer) for i, h in zip(dealt.mine, hidden, strict=True)
        ]
        states = dealt.ordered(own)
        _mean(found.residual.norm, torch.stack([state.norm for state in states]))
        peak, channel = max((state.peak for state in states), key=lambda one: one[0])
        found.residual.absmax.append(peak)
        found.residual.absmax_channel.append(channel)
        maps.add([state.absmax for state in states])
        outliers.extend(one for state in states for one in state.outliers)

    depth(stream.hidden, -1)
    for step in stream.steps(f"observe ({coordinates})"):
        inputs = _Inputs(step.block, model_map)
        ratios, largest = [], 0.0
        noise_ratios: dict[int, list[Tensor]] = {bits: [] for bits in BITS}
        for x, y in step.run():
            x, update = x.to(torch.float32), (y - x).to(torch.float32)
            ratios.append(jump_ratio(x, update))
            for bits in BITS:
                noise_ratios[bits].append(historical_snr(x, update, bits))
            largest = max(largest, float(update.abs().max()))
        inputs.close(dealt)
        spikes.add(step.index, inputs)
        _mean(found.jump_ratio, torch.stack(dealt.ordered(ratios)))
        for bits in BITS:
            _mean(found.snr[str(bits)], torch.stack(dealt.ordered(noise_ratios[bits])))
        found.residual.update_absmax.append(max(everyones(largest)))
        stats = _group_stats(step, model_map, inputs)
        if noise:
            _measure_noise(step, model_map, noise, stats, dealt)
        found.groups += stats
        assert step.outputs is not None
        depth(step.outputs, step.index)
    found.phases = phases(outliers, found.blocks)[:KEEP_PHASES]
    found.outliers = sorted(outliers, key=lambda entry: -entry.times)[:KEEP_OUTLIERS]
    found.token_map = maps.result(tokens, tokenizer)
    found.spikes = spikes.result(tokens, tokenizer)
    return found
