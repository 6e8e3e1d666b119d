"""What a walk over a model's weights is given: the grids, the methods, the text where a method looks at data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from phasequant.arch import ModelMap, Place
from phasequant.numerics import QuantSpec
from phasequant.recipe import LowRankPart, WeightsPart
from phasequant.weight.kept import KeptCodes

Clips = Mapping[str, Float[Tensor, "O G"]]


@dataclass(frozen=True)
class WeightTask:
    """What a walk is given. `others`: grids of groups that do not take `spec`. `clips(block)`: learned clip ratios by
    linear, for `spec`. `tokens`: where a method looks at data. `kept`: where finished blocks are, and go."""

    model: PreTrainedModel
    map: ModelMap
    spec: QuantSpec
    part: WeightsPart
    lowrank: LowRankPart
    stored: torch.dtype
    clips: Callable[[int], Clips]
    tokens: Int[Tensor, "sequences T"] | None
    device: torch.device
    others: Mapping[Place, QuantSpec] = field(default_factory=dict)
    kept: KeptCodes | None = None

    def at(self, block: int, group: str) -> QuantSpec:
        """The grid of a group's codes."""
        return self.others.get((block, group), self.spec)


def needs_tokens(part: WeightsPart, lowrank: LowRankPart) -> bool:
    """Whether the recipe's weight methods look at data."""
    return part.method == "gptq" or (lowrank.method != "none" and lowrank.weighting == "hessian")
