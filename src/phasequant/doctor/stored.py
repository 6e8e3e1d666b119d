"""The few stored tensors on which a kernel or the runtime turns at load: scales, which are small."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from phasequant.arch import ModelMap
from phasequant.doctor.report import Problem


def _named(folder: Path, ending: str) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if name.endswith(ending):
                    yield name, file.get_tensor(name)


def scales_in_16_bits(folder: Path) -> list[Problem]:
    """humming holds scales of weights in 16 bits, and refuses those that are not numbers of it."""
    for name, scale in _named(folder, ".weight_scale"):
        if scale.dtype == torch.float32 and not torch.equal(scale.bfloat16().float(), scale):
            do = "quantize the model again, or set PHASEQUANT_KERNEL=triton-int8"
            return [Problem(name, "its scales are no 16-bit numbers, and humming-int8 refuses them at load", do)]
    return []


def one_second_scale(folder: Path, model_map: ModelMap) -> list[Problem]:
    """The runtime and vLLM stack linears that read one input, and NVFP4 has one second scale a stack."""
    values = {name.rpartition(".")[0]: float(value) for name, value in _named(folder, ".weight_global")}
    stacks: dict[tuple[int, str], set[float]] = {}
    for block, group, name in model_map.linears():
        if name in values:
            stacks.setdefault((block, group), set()).add(values[name])
    wrong = [f"block {block}, {group}" for (block, group), found in stacks.items() if len(found) > 1]
    if not wrong:
        return []
    return [Problem(wrong[0], "its linears have different second scales, and they cannot be stacked",
                    "take --target hf")]  # fmt: skip
