"""What polishing is given, and what it answers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from phasequant.arch import ModelMap, Place
from phasequant.finetune.polished import PolishedBlock, Settled
from phasequant.numerics import LinearMap, QuantSpec
from phasequant.recipe import FinetunePart

FLOOR = 1e-2  # of the learning rates, at the end of the cosine


@dataclass(frozen=True)
class PolishTask:
    """`tokens`: calibration sequences, of which the last ones are held out to judge by. `qk(block)`: the map of a
    block's keys. `stored`: the type of what is not quantized."""

    model: PreTrainedModel
    map: ModelMap
    tokens: Int[Tensor, "sequences T"]
    part: FinetunePart
    stored: torch.dtype
    seed: int
    device: torch.device
    qk: Mapping[int, LinearMap | None]


@dataclass
class Polished:
    """Clips and KV grids that were learned, and what the manifest says about the run."""

    clips: dict[Place, float] = field(default_factory=dict)
    kv: dict[int, tuple[QuantSpec, QuantSpec]] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)

    def add(self, block: int, settled: Settled) -> None:
        """What one block settled on."""
        self.clips |= {(block, group): clip for group, clip in settled.clips.items()}
        if settled.kv is not None:
            self.kv[block] = settled.kv


def optimizer(
    blocks: list[PolishedBlock], part: FinetunePart, more: tuple[tuple[str, nn.Parameter], ...] = ()
) -> torch.optim.Optimizer:
    """AdamW, a rate for each kind of parameter."""
    rates = {"scales": part.lr, "norms": part.lr, "clips": part.clip_lr, "branches": part.branch_lr}
    by_kind: dict[str, list[nn.Parameter]] = {}
    for kind, parameter in (*(pair for block in blocks for pair in block.learned()), *more):
        by_kind.setdefault(kind, []).append(parameter)
    groups = [{"params": params, "lr": rates[kind], "initial_lr": rates[kind]} for kind, params in by_kind.items()]
    return torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.95))


def set_rates(adam: torch.optim.Optimizer, done: float) -> None:
    """The learning rates after a fraction `done` of the work: a cosine from the first ones to a hundredth."""
    for group in adam.param_groups:
        cosine = 0.5 * (1 + math.cos(math.pi * done))
        group["lr"] = group["initial_lr"] * (FLOOR + (1 - FLOOR) * cosine)


def held_out(sequences: int) -> int:
    """How many sequences are kept to judge by: an eighth, at least one; none of a single one."""
    return min(max(1, sequences // 8), sequences - 1)
