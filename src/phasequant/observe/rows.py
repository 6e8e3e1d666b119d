r"""Thresholds of per-token precision: for every group the τ that a share of the calibration tokens exceeds.

    τ(place) = the (1 - share)-quantile of m(x_t) over the calibration tokens            m: `numerics.rows`

taken where the quantizer stands, activations in 16 bits. So the share of rows in 8 bits is what was asked for on the
calibration text, in every group; on other text it is what it is, and is counted (`QuantLinear.rows`). Costs one sweep.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from phasequant.arch import ModelMap, Place
from phasequant.nn import in_16_bits
from phasequant.numerics import QuantSpec, measure_rows
from phasequant.observe.entrances import See, at_entrances
from phasequant.stream import BlockStream


@torch.no_grad()
def row_thresholds(
    model: PreTrainedModel,
    model_map: ModelMap,
    tokens: Int[Tensor, "sequences T"],
    grids: Mapping[Place, QuantSpec | None],
    rule: str,
    share: float,
    device: torch.device | None = None,
) -> dict[Place, float]:
    """τ of every group that `grids` gives a grid; the model is transformed, its weights dense."""
    thresholds: dict[Place, float] = {}
    with in_16_bits(model):
        stream = BlockStream(model, model_map, tokens, device, spread=True)
        for step in stream.steps(f"rows ({rule})"):
            specs = {group.name: grids.get((step.index, group.name)) for group in model_map.groups}
            found: dict[str, list[Tensor]] = {name: [] for name, spec in specs.items() if spec is not None}

            def see(name: str, highest: int, into: dict[str, list[Tensor]] = found) -> See:
                return lambda x: into[name].append(measure_rows(x, rule, highest).cpu())

            with at_entrances(
                step.block,
                model_map,
                {name: see(name, spec.highest) for name, spec in specs.items() if spec is not None},
            ):
                step.drain()
            for name, rows in found.items():
                sorted_rows = torch.cat(stream.dealt.ordered(rows)).sort().values
                at = min(len(sorted_rows) - 1, int(len(sorted_rows) * (1 - share)))
                thresholds[step.index, name] = float(sorted_rows[at])
    return thresholds
