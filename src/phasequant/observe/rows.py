r"""Thresholds of per-token precision: for every group the τ that a share of the calibration tokens exceeds.

    τ(place) = the (1 - share)-quantile of m(x_t) over the calibration tokens            m: `numerics.rows`

taken where the quantizer stands, activations in 16 bits. So the share of rows in 8 bits is what was asked for on the
calibration text, in every group; on other text it is what it is, and is counted (`QuantLinear.rows`). Costs one sweep.
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from phasequant.arch import ModelMap, Place
from phasequant.nn import in_16_bits, prepared
from phasequant.numerics import QuantSpec, measure_rows
from phasequant.stream import BlockStream


def _keeper(rule: str, highest: int, found: list[Tensor]) -> Callable[..., None]:
    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(measure_rows(prepared(module, args[0].flatten(0, -2).float()), rule, highest).cpu())

    return keep


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
        stream = BlockStream(model, model_map, tokens, device)
        for step in stream.steps(f"rows ({rule})"):
            found: dict[str, list[Tensor]] = {}
            hooks = []
            for group in model_map.groups:
                spec = grids.get((step.index, group.name))
                if spec is not None:
                    found[group.name] = []
                    entrance = step.block.get_submodule(group.input)
                    hooks.append(entrance.register_forward_pre_hook(_keeper(rule, spec.highest, found[group.name])))
            step.drain()
            for hook in hooks:
                hook.remove()
            for name, rows in found.items():
                sorted_rows = torch.cat(rows).sort().values
                at = min(len(sorted_rows) - 1, int(len(sorted_rows) * (1 - share)))
                thresholds[step.index, name] = float(sorted_rows[at])
    return thresholds
