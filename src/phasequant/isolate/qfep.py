r"""QFeP: a prefix that takes the activation spikes with it (arXiv 2405.14428, `generate_prefix` of its code).

    1. m* = argmax_m r(m)                      the group whose input a few tokens dominate most (observe.spikes)
    2. per sequence the 3 tokens of largest s in m*, the begin token left out; per token id its largest s; of these ids
       the K = 3 largest are candidates t
    3. contexts c: the 200 most frequent ids of the text; for all c the five tokens [begin, c, t, c, t] run up to m*,
       in one batch; c* = argmax s₂/s₄: the first t spikes, and once it stands there the second does not
    4. the (c*, t) of the largest s₂/s₄ over the candidates; prefix = [begin, c*, t]

Costs one sweep of the calibration text, and K batches of 200 × 5 tokens up to m*.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from phasequant.arch import ModelMap
from phasequant.observe.spikes import Spikes, spike_ratio, token_absmax
from phasequant.recipe import PrefixPart
from phasequant.stream import home_of, visiting

A_SEQUENCE = 3  # tokens of each sequence that may become candidates


class _Reached(Exception):
    """The wanted input has come."""


@torch.no_grad()
def input_absmax(
    model: PreTrainedModel,
    model_map: ModelMap,
    block: int,
    group: str,
    tokens: Int[Tensor, "B T"],
    device: torch.device | None = None,
) -> Float[Tensor, "B T"]:
    """Token-wise absmax of one group's input, all sequences in one batch; the model runs no further. Its blocks visit
    `device`, one at a time."""
    found: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(token_absmax(args[0], model_map.rows_seen(group)).float().cpu())
        raise _Reached

    name = f"{model_map.block_name(block)}.{model_map.group(group).input}"
    hook = model.get_submodule(name).register_forward_pre_hook(keep)
    try:
        with visiting(model, model_map, device), suppress(_Reached):
            decoder = model.get_submodule(model_map.family.decoder)
            decoder(input_ids=tokens.to(home_of(model)), use_cache=False)
    finally:
        hook.remove()
    return found[0].reshape(tokens.shape)


def candidates(absmax: Float[Tensor, "S T"], tokens: Int[Tensor, "S T"], begin: int | None, most: int) -> list[int]:
    """Ids of the tokens that spike most, the begin token left out."""
    best: dict[int, float] = {}
    for row, ids in zip(absmax, tokens, strict=True):
        for at in row.topk(min(A_SEQUENCE, len(row))).indices.tolist():
            token = int(ids[at])
            if token != begin:
                best[token] = max(best.get(token, 0.0), float(row[at]))
    return sorted(best, key=lambda token: -best[token])[:most]


def spiking_prefix(
    model: PreTrainedModel,
    model_map: ModelMap,
    tokens: Int[Tensor, "S T"],
    spikes: Spikes,
    begin: int | None,
    part: PrefixPart,
    device: torch.device | None = None,
) -> tuple[list[int], dict[str, Any]]:
    """([begin, c*, t], numbers of the search). `tokens` begin with `begin`, where there is one."""
    ratios: Mapping[tuple[int, str], float] = {place: spike_ratio(s) for place, s in spikes.items()}
    block, group = max(ratios, key=lambda place: ratios[place])
    counts = torch.bincount(tokens.flatten())
    if begin is not None:
        counts[begin] = 0
    frequent = counts.topk(min(part.contexts, int((counts > 0).sum()))).indices
    first = [] if begin is None else [begin]
    best, chosen = 0.0, []
    tried = []
    for token in candidates(spikes[block, group], tokens, begin, part.candidates):
        rows = torch.stack([torch.tensor([*first, int(c), token, int(c), token]) for c in frequent])
        s = input_absmax(model, model_map, block, group, rows, device)
        once, again = s[:, len(first) + 1], s[:, len(first) + 3]
        times = once / again.clamp(min=1e-20)
        at = int(times.argmax())
        tried.append({"token": token, "context": int(frequent[at]), "times": round(float(times[at]), 2)})
        if float(times[at]) > best:
            best, chosen = float(times[at]), [*first, int(frequent[at]), token]
    notes = {"place": f"{block}.{group}", "ratio": round(ratios[block, group], 2), "times": round(best, 2)}
    return chosen, {**notes, "tried": tried}
