"""What a sensitivity is asked and what it answers.

harm(place, bits): how much worse the model is because this group reads `bits`; 0 in 16 bits. The unit is the measure's
own (nats for `kl`); a planner only compares sums of one measure. Grids between the measured ones are not guessed: each
choice is measured, except by the measures that are read off a sweep, where rounding noise falls by 4 a bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from phasequant.arch import ModelMap, Place
from phasequant.numerics import LinearMap, QuantSpec
from phasequant.observe import Observations

Harm = Mapping[Place, Mapping[int, float]]


@dataclass(frozen=True)
class Runs:
    """What a measure that runs the model is given."""

    model: PreTrainedModel
    tokens: Int[Tensor, "sequences T"]
    device: torch.device


@dataclass(frozen=True)
class Ask:
    """`seen`: a sweep of the transformed model. `low`: the grid of all; `choices`: the grids that a group may be raised
    to (None: 16 bits). For those that run the model: the transformed model itself with dense weights, activations in 16
    bits, and calibration sequences. `clips`: of the low grid, group by group, where they were searched. `weights`,
    `kv`: grids of those, the low one first, where they share the budget; `qk`: the map of keys by block."""

    map: ModelMap
    seen: Observations
    low: QuantSpec
    choices: tuple[QuantSpec | None, ...]
    first_token: bool = False
    runs: Runs | None = None
    clips: Mapping[Place, float] = field(default_factory=dict)
    weights: tuple[QuantSpec, ...] = ()
    kv: tuple[QuantSpec, ...] = ()
    qk: Mapping[int, LinearMap | None] = field(default_factory=dict)

    @property
    def run(self) -> "Runs":
        """The model, which a measure that runs it needs."""
        assert self.runs is not None, "this measure runs the model"
        return self.runs

    def at(self, place: Place, spec: QuantSpec | None) -> QuantSpec | None:
        """A grid as this group reads it: dynamic, and the low one with the clip that was searched for the group."""
        if spec is None:
            return None
        if spec == self.low and place in self.clips:
            spec = replace(spec, clip=self.clips[place])
        return spec.dynamic

    @property
    def places(self) -> list[Place]:
        """Every group of every block, in order of computation."""
        return [(block, group.name) for block in self.map.blocks for group in self.map.groups]


WEIGHTS, KV = "weights:", "kv"
"""How harm names a block's weights of a group (`weights:qkv`), and its keys and values."""


def bits_of(spec: QuantSpec | None) -> int:
    """Of a grid; none means 16."""
    return 16 if spec is None else spec.bits


@dataclass(frozen=True)
class Sensitivity:
    """What a measure found: harm by place and bits, and what finding it took. `notes`: its own numbers."""

    name: str
    harm: Harm
    seconds: float
    notes: Mapping[str, float]

    def gain(self, place: Place, low: int, high: int) -> float:
        """What raising one group wins."""
        return self.harm[place][low] - self.harm[place][high]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "name": self.name,
            "seconds": round(self.seconds, 1),
            "notes": dict(self.notes),
            "harm": {f"{b}.{g}": {str(n): h for n, h in by.items()} for (b, g), by in self.harm.items()},
        }
