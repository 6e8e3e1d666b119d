r"""Outlier Suppression+: channels that reach beyond t are divided down to t (arXiv 2304.09145), scales alone.

    s_j = max( 1, max|X_j| / t )        x → x / s,  W → W·diag(s)        W over all linears that read X

t is one for every input, the one of 24 between the median channel's largest value and the largest of all with the least
‖Q(X/s)·Q(W·s)ᵀ - XWᵀ‖² on a sample of tokens; at t = max|X| nothing is scaled. Where SmoothQuant moves every channel by
a power, this leaves all but the outlying ones alone. Scales are folded where SmoothQuant's are (`smooth`); nothing runs
online.

The paper also shifts channels to be symmetric around zero. That needs a bias where the input comes from, which RMSNorms
and most linears do not have; the shift is left out, also where LayerNorms would take it.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from phasequant.arch import ModelMap
from phasequant.numerics import QuantSpec
from phasequant.stream import BlockStream
from phasequant.transform.contract import BlockTransform, Task, Transform
from phasequant.transform.gather import group_weight
from phasequant.transform.smooth import (
    TINY,
    folded_scales,
    observe_inputs,
    over_query_heads,
    scaled_error,
    shared_by_kv_heads,
)

STEPS = 24


def beyond(peak: Float[Tensor, " n"], t: float) -> Float[Tensor, " n"]:
    """s: 1 for channels that stay within t."""
    return (peak / max(t, TINY)).clamp(min=1.0)


def search(
    peak: Float[Tensor, " n"],
    sample: Float[Tensor, "T n"],
    weight: Float[Tensor, "O n"],
    inputs: QuantSpec | None,
    weights: QuantSpec | None,
) -> Float[Tensor, " n"]:
    """The scales of the best t; ones where nothing is better."""
    top, typical = float(peak.max()), float(peak.median())
    best, found = scaled_error(sample, weight, torch.ones_like(peak), inputs, weights), torch.ones_like(peak)
    if not 0 < typical < top:
        return found
    for t in torch.logspace(0, 1, STEPS, base=top / typical).tolist()[:-1]:
        s = beyond(peak, typical * t)
        error = scaled_error(sample, weight, s, inputs, weights)
        if error < best:
            best, found = error, s
    return found


def _scales(
    block: nn.Module,
    model_map: ModelMap,
    peaks: dict[str, Tensor],
    samples: dict[str, Tensor],
    grids: dict[str, QuantSpec | None],
    weights: QuantSpec | None,
) -> dict[str, Float[Tensor, " n"]]:
    found: dict[str, Tensor] = {}
    for group in model_map.groups:
        peak, weight = peaks[group.name], group_weight(block, model_map.sharing(group.name))
        if group.name == "o" and model_map.family.value is not None:
            peak = over_query_heads(shared_by_kv_heads(peak, model_map), model_map)
        elif model_map.scale_of(group.name) is None:
            continue
        found[group.name] = search(peak, samples[group.name], weight, grids[group.name], weights)
    return found


def os_plus(task: Task) -> Transform:
    """Outlier Suppression+'s scales."""
    assert task.tokens is not None
    weights = None if task.weights is None else QuantSpec(**{**task.weights.to_dict(), "clip": 1.0})
    blocks: list[BlockTransform] = []
    stream = BlockStream(task.model, task.map, task.tokens, task.device)
    for step in stream.steps("os-plus"):
        peaks, samples = observe_inputs(step, task.map, len(task.tokens))
        grids = {group.name: task.activations.get((step.index, group.name)) for group in task.map.groups}
        blocks.append(folded_scales(_scales(step.block, task.map, peaks, samples, grids, weights), task.map))
    return Transform("os-plus", blocks=tuple(blocks))
