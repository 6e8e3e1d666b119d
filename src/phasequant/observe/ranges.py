r"""Ranges of static grids: what every group's input reaches on the calibration text, (lowest, highest), kept at most T.

    absmax       T = max|x|
    percentile   T = the p-th percentile of |x|
    mse          T = argmin Σ min(x², Δ²/12) over |x| ≤ T  +  Σ (|x| - T)² over |x| > T,     Δ = T / q_max

over all values (per tensor) or over each channel's (per column). Percentile and mse are read off a histogram of
log2|x| with 32 bins an octave, 2^-24 … 2^24: T is known to 2 %, whatever the data, in one pass and fixed memory
(1536 counts, a channel or in all). With asymmetric grids T bounds both ends.

Inputs are taken where the quantizer stands, after what runs online, with every activation in 16 bits; tokens of a
prefix are not among them, and what they do to the others is. A plan may raise groups later: a range serves any bits but
mse's, which is taken for the bits that the plan gives.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from phasequant.arch import ModelMap
from phasequant.nn import Activations, QuantLinear, in_16_bits
from phasequant.numerics import QuantSpec
from phasequant.observe.entrances import at_entrances
from phasequant.ranks import Dealt, everyones
from phasequant.stream import BlockStream

OCTAVES, BINS = 48, 32  # 2^-24 … 2^24; bins an octave
EDGE = OCTAVES // 2


class Reached:
    """The extremes, and where wanted a histogram, of the values of one input: in all or by column."""

    def __init__(self, columns: int | None, histogram: bool) -> None:
        self.columns = columns
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self._wants = histogram
        self.counts: Tensor | None = None

    def add(self, x: Float[Tensor, "T n"]) -> None:
        """Values more."""
        rows = x.float() if self.columns is not None else x.float().reshape(-1, 1)
        low, high = rows.amin(0), rows.amax(0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        if self._wants:
            places = ((rows.abs().log2() + EDGE) * BINS).floor().clamp(0, OCTAVES * BINS - 1).long()
            places += torch.arange(rows.shape[1], device=x.device) * (OCTAVES * BINS)
            found = torch.bincount(places.flatten(), minlength=rows.shape[1] * OCTAVES * BINS)
            found = found.reshape(rows.shape[1], -1)
            self.counts = found if self.counts is None else self.counts + found

    def together(self, dealt: Dealt) -> None:
        """Take in what other ranks have seen."""
        if dealt.step > 1:
            assert self.low is not None and self.high is not None
            self.low = torch.stack([low.to(self.low) for low in everyones(self.low)]).amin(0)
            self.high = torch.stack([high.to(self.high) for high in everyones(self.high)]).amax(0)
            if self.counts is not None:
                dealt.total(self.counts)

    def range(self, most: Float[Tensor, " m"] | None = None) -> Float[Tensor, "2 m"]:
        """(lowest, highest), no further from zero than `most`."""
        assert self.low is not None and self.high is not None
        found = torch.stack((self.low, self.high))
        return found if most is None else found.clamp(-most, most)

    def percentile(self, percent: float) -> Float[Tensor, " m"]:
        """The upper edge of the bin where `percent` of the magnitudes are reached."""
        assert self.counts is not None
        share = self.counts.double().cumsum(1) / self.counts.sum(1, keepdim=True)
        at = (share < percent / 100 - 1e-12).sum(1)
        return torch.exp2((at + 1).float() / BINS - EDGE)

    def least_error(self, spec: QuantSpec) -> Float[Tensor, " m"]:
        """The T of least expected squared error on the grid `spec`."""
        assert self.counts is not None
        bins = torch.arange(OCTAVES * BINS, device=self.counts.device, dtype=torch.float64)
        centre, edge = torch.exp2((bins + 0.5) / BINS - EDGE), torch.exp2((bins + 1) / BINS - EDGE)
        steps = spec.highest if spec.symmetric else spec.highest / 2
        seen = self.counts.sum(0) > 0
        best = torch.full((len(self.counts),), math.inf, dtype=torch.float64, device=edge.device)
        found = torch.zeros_like(best)
        counts = self.counts.double()
        for most in edge[seen].flip(0).tolist():
            rounding = torch.minimum(centre.square(), torch.tensor((most / steps) ** 2 / 12, device=edge.device))
            error = counts @ torch.where(centre <= most, rounding, (centre - most).square())
            better = error < best
            best, found = torch.where(better, error, best), torch.where(better, most, found)
        return found.float()


def chosen_range(reached: Reached, spec: QuantSpec, method: str, percent: float) -> Float[Tensor, "2 m"]:
    """The range that `method` gives a static grid."""
    if method == "absmax":
        return reached.range()
    return reached.range(reached.percentile(percent) if method == "percentile" else reached.least_error(spec))


@torch.no_grad()
def calibrate_ranges(
    model: PreTrainedModel,
    model_map: ModelMap,
    tokens: Int[Tensor, "sequences T"],
    activations: Activations,
    *,
    method: str = "absmax",
    percent: float = 99.99,
    device: torch.device | None = None,
) -> None:
    """Give every linear of a transformed model the range of its static grid in `activations`, in place."""
    with in_16_bits(model):
        stream = BlockStream(model, model_map, tokens, device, spread=True)
        for step in stream.steps(f"ranges ({method})"):
            reached: dict[str, Reached] = {}
            for group in model_map.groups:
                spec = activations[step.index, group.name]
                if spec is not None and spec.static:
                    columns = model_map.width_in(group.name) if spec.granularity == "column" else None
                    reached[group.name] = Reached(columns, method != "absmax")
            with at_entrances(step.block, model_map, {name: one.add for name, one in reached.items()}):
                step.drain()
            for group in model_map.groups:
                if group.name in reached:
                    reached[group.name].together(stream.dealt)
                    spec = activations[step.index, group.name]
                    assert spec is not None
                    found = chosen_range(reached[group.name], spec, method, percent)
                    for name in group.linears:
                        linear = step.block.get_submodule(name)
                        assert isinstance(linear, QuantLinear)
                        linear.set_range(found)
