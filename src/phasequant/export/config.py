"""`quantization_config` of a stock checkpoint.

One config group for each pair of grids, weights and inputs. Where there is one, its target is `Linear`, and the head
stands under `ignore`; where there are several, targets are patterns over blocks and the names of a group, all of its
linears in one pattern: servers fuse q, k, v and gate, up, and refuse shards of different schemes.

The format is forced, as what compressed-tensors infers (`int-quantized`) is not what vLLM has W4A4 for. Left out is
`kv_cache_scheme`: vLLM takes FP8 alone. Columns are never reordered (no `actorder`).
"""

from typing import Any

from compressed_tensors import __version__ as ct_version
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from compressed_tensors.quantization.quant_args import QuantizationArgs
from compressed_tensors.quantization.quant_scheme import QuantizationScheme

from phasequant.arch import ModelMap, Place
from phasequant.export.profiles import Profile, plain
from phasequant.nn import Activations, ModelLayout
from phasequant.numerics import QuantSpec

PRESETS = {"nvfp4": "NVFP4", "mxfp4": "MXFP4"}
Pair = tuple[QuantSpec, QuantSpec | None]


def scheme(weights: QuantSpec, inputs: QuantSpec | None, targets: list[str], form: str) -> QuantizationScheme:
    """One config group."""
    if weights.is_int:
        own = QuantizationArgs(
            num_bits=weights.bits,
            type="int",
            symmetric=weights.symmetric,
            strategy=weights.granularity,
            group_size=weights.group_size,
        )
        read = inputs and QuantizationArgs(
            num_bits=inputs.bits, type="int", symmetric=True, strategy="token", dynamic=True, observer=None
        )
        return QuantizationScheme(targets=targets, weights=own, input_activations=read, format=form)
    made = preset_name_to_scheme(PRESETS[weights.kind], targets)
    return made.model_copy(
        update={"format": form, "input_activations": made.input_activations if inputs is not None else None}
    )


def by_pair(layout: ModelLayout, inputs: Activations, model_map: ModelMap) -> dict[Pair, list[Place]]:
    """Places by the grids of their weights and inputs, the commonest first."""
    found: dict[Pair, list[Place]] = {}
    for block in model_map.blocks:
        for group in model_map.groups:
            weights = layout.weights_at(block, group.name)
            assert weights is not None
            found.setdefault((plain(weights), inputs[block, group.name]), []).append((block, group.name))
    return dict(sorted(found.items(), key=lambda entry: -len(entry[1])))


def targets_of(places: list[Place], model_map: ModelMap) -> list[str]:
    """One pattern a group: its blocks, and all of its linears."""
    found = []
    for group in model_map.groups:
        blocks = "|".join(str(block) for block, name in places if name == group.name)
        if blocks:
            names = "|".join(name.replace(".", r"\.") for name in group.linears)
            found.append(rf"re:.*{model_map.family.blocks.rpartition('.')[2]}\.({blocks})\.({names})$")
    return found


def quantization_config(
    layout: ModelLayout, inputs: Activations, model_map: ModelMap, profile: Profile
) -> dict[str, Any]:
    """For config.json."""
    pairs = by_pair(layout, inputs, model_map)
    groups = {
        f"group_{at}": scheme(*pair, ["Linear"] if len(pairs) == 1 else targets_of(places, model_map), profile.format)
        for at, (pair, places) in enumerate(pairs.items())
    }
    made = QuantizationConfig(
        config_groups=groups,
        format=profile.format,
        quantization_status="compressed",
        ignore=[model_map.family.head],
    )
    found: dict[str, Any] = made.model_dump(mode="json", exclude_none=True)
    return {**found, "version": ct_version}
