"""What the vLLM plugin computes as promised, and what it refuses: rules on a layout, without vLLM and without weights.

    linears      any grid, map and branch that a kernel of ours takes: they are computed by our kernels
    KV grid      keys and values are rounded to the checkpoint's own grid, then kept in vLLM's 16-bit cache: the
                 promised numbers, but 16-bit bytes
    prefix       its token ids stand before every prompt; the stored keys and values take the place of theirs
    refused      mixtures of experts, parts of a model on several devices (tensor and pipeline parallel)

A prefix needs the positions of the tokens in every attention, which vLLM tells outside of compiled graphs only: such
checkpoints run with `enforce_eager`.
"""

from phasequant.arch import ModelMap
from phasequant.nn import ModelLayout


def refusals(
    layout: ModelLayout, model_map: ModelMap, *, tensor_parallel: int = 1, pipeline_parallel: int = 1
) -> list[str]:
    """Why the plugin does not take a checkpoint, a sentence each; empty where it does."""
    found = []
    if model_map.family.experts is not None:
        found.append(
            f"{model_map.family.name} has a mixture of experts, which vLLM computes in kernels of its own: "
            "the plugin takes dense models only"
        )
    if tensor_parallel > 1:
        found.append(
            f"tensor_parallel_size={tensor_parallel}: the scale of a token is taken over the whole input of a linear, "
            "and a shard sees a part of it; use tensor_parallel_size=1 (data parallel replicas work)"
        )
    if pipeline_parallel > 1 and layout.prefix is not None:
        found.append(
            f"pipeline_parallel_size={pipeline_parallel}: a prefix is checked where tokens are embedded, which only "
            "the first stage does; use pipeline_parallel_size=1"
        )
    return found


def eager(layout: ModelLayout) -> str | None:
    """Why vLLM must not compile this checkpoint's forward (`enforce_eager`); None where it may."""
    if layout.prefix is not None:
        return "the prefix needs every token's position in attention, which compiled graphs do not have"
    return None
