"""What the vLLM plugin computes as promised, and what it refuses: rules on a layout, without vLLM and without weights.

    linears      any grid, map and branch that a kernel of ours takes: they are computed by our kernels
    KV grid      keys and values are rounded to the checkpoint's own grid, then kept in vLLM's 16-bit cache: the
                 promised numbers, but 16-bit bytes
    prefix       its token ids stand before every prompt; the stored keys and values take the place of theirs
    tensor       the integers of one device, where the maps before o and down are blocks that divide among the devices
    parallel     (`shards`): Hadamards of rotation.block, or none (rotation.online=false); one of the whole width, or
                 over all heads, does not divide
    refused      mixtures of experts; families that vLLM builds otherwise (`UNSERVED`); a prefix on several pipeline
                 stages

A prefix needs the positions of the tokens in every attention, which vLLM tells outside of compiled graphs only: such
checkpoints run with `enforce_eager`.
"""

from phasequant.arch import ModelMap
from phasequant.nn import ModelLayout

CUT = ("o", "down")
"""Groups whose inputs are divided among devices."""

_PARTS = "vLLM stacks linears here that it does not tell the plugin the parts of"
UNSERVED = {
    "Phi-3": "its checkpoints hold q, k and v in one linear, gate and up in another, which vLLM loads part by part",
    "GPT-NeoX": "vLLM names the modules of its attention by another path than its checkpoints do",
    "StableLM": _PARTS,
    "StableLM, parallel": _PARTS,
}
"""Family → why vLLM's own model of it does not load our checkpoints."""


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
    if model_map.family.name in UNSERVED:
        found.append(f"{model_map.family.name}: {UNSERVED[model_map.family.name]}")
    if tensor_parallel > 1:
        why = _indivisible(layout, model_map, tensor_parallel)
        if why:
            found.append(
                f"tensor_parallel_size={tensor_parallel}: {'; '.join(why)}. Use tensor_parallel_size=1 (data parallel "
                "replicas work), or quantize with maps that divide: rotation.online=false, or rotation.block (quarot, "
                "rotation.where=online)"
            )
    if pipeline_parallel > 1 and layout.prefix is not None:
        found.append(
            f"pipeline_parallel_size={pipeline_parallel}: a prefix is checked where tokens are embedded, which only "
            "the first stage does; use pipeline_parallel_size=1"
        )
    return found


def _indivisible(layout: ModelLayout, model_map: ModelMap, devices: int) -> list[str]:
    """What of a layout does not divide among devices."""
    shape, found = model_map.shape, []
    if shape.heads % devices or shape.kv_heads % devices:
        found.append(f"{shape.heads} heads and {shape.kv_heads} kv heads do not divide")
    for group in CUT:
        width = model_map.width_in(group)
        if width % (2 * devices):
            found.append(f"the {width} inputs of {group} do not divide")
            continue
        online = layout.online.get(group)
        if online is not None and online["blocks"] % devices:
            found.append(
                f"the map before {group} is {online['blocks']} block{'s' * (online['blocks'] > 1)} over {width} inputs"
            )
        for block in model_map.blocks:
            weight, given = layout.weights_at(block, group), layout.activations[block, group]
            if weight is not None and weight.group_size and (width // devices) % weight.group_size:
                found.append(
                    f"groups of {weight.group_size} weights do not divide {width // devices} inputs of {group}"
                )
            elif any(spec is not None and not spec.is_int for spec in (weight, given)):
                found.append(f"floating-point grids of {group} are not computed in parts")
            elif given is not None and given.granularity == "column":
                found.append(f"the static grids of {group} have a scale a channel")
            elif given is not None and given.rows_by == "gsr":
                found.append(f"which tokens of {group} read 8 bits is decided by their standard deviation")
            else:
                continue
            break
    return found


def eager(layout: ModelLayout) -> str | None:
    """Why vLLM must not compile this checkpoint's forward (`enforce_eager`); None where it may."""
    if layout.prefix is not None:
        return "the prefix needs every token's position in attention, which compiled graphs do not have"
    return None
