"""`ModelLayout`: everything that decides which modules a quantized model has and on which grids they compute.

It is what `config.json` carries: from it and the architecture's config an empty model is laid out, and weights only
have to be filled in. The pipeline builds the same modules from live tensors, so what is saved is what was measured.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from phasequant.arch import GROUPS, ModelMap
from phasequant.errors import PhaseQuantError
from phasequant.nn.attention import attach
from phasequant.nn.kv import KVQuantizer
from phasequant.nn.linear import QuantLinear
from phasequant.nn.online import OnlineRotation
from phasequant.numerics import QuantSpec

Activations = dict[tuple[int, str], QuantSpec | None]
"""(block, group) → the grid its input is read on; None is 16 bits."""


@dataclass
class ModelLayout:
    """`online`: group → `OnlineRotation.layout()`. `qk`: orders of R3's factors, or None."""

    weights: QuantSpec | None = None
    kv: QuantSpec | None = None
    activations: Activations = field(default_factory=dict)
    online: dict[str, dict[str, Any]] = field(default_factory=dict)
    qk: tuple[int, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """For `config.json`: the commonest activation grid once, the others by name."""
        specs = list(self.activations.values())
        base = max(specs, key=specs.count) if specs else None
        others = {
            f"{block}.{group}": spec and spec.to_dict()
            for (block, group), spec in sorted(self.activations.items())
            if spec != base
        }
        return {
            "weights": self.weights and self.weights.to_dict(),
            "kv": self.kv and self.kv.to_dict(),
            "activations": {"base": base and base.to_dict(), "others": others},
            "online": self.online,
            "qk": list(self.qk) if self.qk else None,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], model_map: ModelMap) -> "ModelLayout":
        """The inverse of `to_dict`, checked against the model."""

        def spec(entry: Mapping[str, Any] | None) -> QuantSpec | None:
            return QuantSpec.from_dict(entry) if entry is not None else None

        try:
            activations: Activations = {
                (block, group): spec(values["activations"]["base"]) for block in model_map.blocks for group in GROUPS
            }
            for name, entry in values["activations"]["others"].items():
                block, group = name.split(".")
                if (int(block), group) not in activations:
                    raise PhaseQuantError(f"the config gives bits to '{name}', which this model does not have")
                activations[int(block), group] = spec(entry)
            qk = values["qk"]
            return cls(
                weights=spec(values["weights"]),
                kv=spec(values["kv"]),
                activations=activations,
                online={group: dict(entry) for group, entry in values["online"].items()},
                qk=(int(qk[0]), int(qk[1])) if qk else None,
            )
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise PhaseQuantError(
                f"the quantization config is not one of PhaseQuant's ({type(error).__name__}: {error}): "
                "config.json was edited or cut short; get it again"
            ) from error


def set_activations(model: nn.Module, model_map: ModelMap, activations: Activations) -> None:
    """Put every linear's input on its group's grid."""
    for block, group, name in model_map.linears():
        module = model.get_submodule(name)
        assert isinstance(module, QuantLinear)
        module.input_spec = activations[block, group]


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at the dotted `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def attach_kv(model: PreTrainedModel, model_map: ModelMap, spec: QuantSpec, qk: tuple[int, int] | None) -> None:
    """Empty KV quantizers, for a loader to fill."""
    left, right = qk or (0, 0)
    device = next(model.parameters()).device
    attach(model, model_map, lambda: KVQuantizer(spec, model_map.shape.d_head, left, right, device=device))


def lay_out(model: PreTrainedModel, model_map: ModelMap, layout: ModelLayout, dtype: torch.dtype) -> None:
    """Replace the linears of an unfilled model by empty `QuantLinear`s, on the device where the linears are."""
    for block, group, name in model_map.linears():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        device = linear.weight.device
        online = OnlineRotation(**layout.online[group], device=device) if group in layout.online else None
        module = QuantLinear(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            weight_spec=layout.weights,
            input_spec=layout.activations[block, group],
            online=online,
            device=device,
            dtype=dtype,
        )
        replace_module(model, name, module)
    if layout.kv is not None:
        attach_kv(model, model_map, layout.kv, layout.qk)


def quant_linears(model: nn.Module) -> list[tuple[str, QuantLinear]]:
    """Every `QuantLinear` with its name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, QuantLinear)]
