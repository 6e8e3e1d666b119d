"""How long the linears of each group take on this device, by the bits of their input, with the kernels that run here.

Random codes and inputs of the model's sizes; calls of all bits take turns, so that what else the machine does meets all
alike; the median of `repeats` calls after one to warm up. What is timed is `QuantLinear`: rounding the input, the
product, scaling; online maps are the same at all bits and are left out.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from phasequant.arch import ModelMap
from phasequant.kernels import choose
from phasequant.nn import QuantLinear
from phasequant.numerics import QuantSpec, quantize


@dataclass(frozen=True)
class LinearTime:
    """One group of one block, at one grid of its input. `microseconds`: a call on `tokens` rows, median."""

    group: str
    bits: int
    kernel: str
    tokens: int
    microseconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def _linear(width_in: int, width_out: int, weights: QuantSpec | None, device: torch.device) -> QuantLinear:
    generator = torch.Generator().manual_seed(0)
    linear = QuantLinear.dense(torch.randn(width_out, width_in, generator=generator).to(device), None)
    if weights is not None:
        codes, scale, zero = quantize(linear.dense_weight(), weights)
        linear.set_codes(codes, scale, zero, weights)
    return linear


@torch.no_grad()
def time_linears(
    model_map: ModelMap,
    weights: QuantSpec | None,
    inputs: Sequence[QuantSpec | None],
    device: torch.device,
    tokens: int = 2048,
    repeats: int = 9,
) -> list[LinearTime]:
    """Every group of one block under every grid of `inputs`."""
    plain = None if weights is None or weights.clip != "mse" else weights
    if plain is not None:
        weights = QuantSpec(plain.bits, plain.symmetric, plain.granularity, plain.group_size, kind=plain.kind)
    found = []
    for group in model_map.groups:
        width = model_map.width_in(group.name)
        linear = _linear(width, model_map.width_out(group.name), weights, device)
        x = torch.randn(tokens * model_map.rows(group.name), width, device=device)
        taken: dict[int, list[float]] = {at: [] for at in range(len(inputs))}
        for turn in range(repeats + 1):
            for at, spec in enumerate(inputs):
                linear.input_spec = spec
                _wait(device)
                begun = time.perf_counter()
                linear(x)
                _wait(device)
                if turn:
                    taken[at].append(1e6 * (time.perf_counter() - begun))
        for at, spec in enumerate(inputs):
            linear.input_spec = spec
            kernel = choose(linear.spec, device).name
            found.append(LinearTime(group.name, 16 if spec is None else spec.bits, kernel, tokens, median(taken[at])))
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
