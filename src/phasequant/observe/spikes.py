r"""Token-wise absmax and QFeM's ratio: which linear inputs a few tokens dominate (arXiv 2405.14428).

    s[i,t] = max_j |X[i,t,j]|        sequence i, token t
    r      = mean_i ( max_t s[i,t] / median_t s[i,t] )

The median is torch's lower one, as in the authors' code. A grid shared by all tokens must stretch to max s; a ratio of
1000 leaves the median token a thousandth of it.
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from phasequant.arch import ModelMap
from phasequant.stream import BlockStream


def token_absmax(x: Float[Tensor, "*sequences R n"], rows: int = 1) -> Float[Tensor, "*sequences T"]:
    """s of every token; of experts' inputs, which has several `rows` a token, one after the other."""
    absmax = x.abs().amax(-1)
    return absmax if rows == 1 else absmax.unflatten(-1, (-1, rows)).amax(-1)


def spike_ratio(absmax: Float[Tensor, "sequences T"]) -> float:
    """QFeM's r of one linear input."""
    return float((absmax.amax(-1) / absmax.median(-1).values.clamp(min=1e-20)).mean())


Spikes = Mapping[tuple[int, str], Float[Tensor, "sequences T"]]
"""(block, group) → token-wise absmax of what its linears read."""


@torch.no_grad()
def token_spikes(
    model: PreTrainedModel,
    model_map: ModelMap,
    tokens: Int[Tensor, "sequences T"],
    device: torch.device | None = None,
) -> Spikes:
    """Token-wise absmax of every group's input, in one sweep."""
    found: dict[tuple[int, str], Tensor] = {}
    stream = BlockStream(model, model_map, tokens, device, spread=True)
    for step in stream.steps("spikes"):
        seen: dict[str, list[Tensor]] = {group.name: [] for group in model_map.groups}

        def keeper(rows: list[Tensor], times: int) -> Callable[..., None]:
            return lambda module, args: rows.append(token_absmax(args[0], times).flatten().float().cpu())

        hooks = [
            step.block.get_submodule(group.input).register_forward_pre_hook(
                keeper(seen[group.name], model_map.rows_seen(group.name))
            )
            for group in model_map.groups
        ]
        step.drain()
        for hook in hooks:
            hook.remove()
        found |= {(step.index, name): torch.stack(stream.dealt.ordered(rows)) for name, rows in seen.items()}
    return found
