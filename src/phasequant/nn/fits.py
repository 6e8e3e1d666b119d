"""Whether a grid or a map of a layout suits the place that it is given: asked before a tensor is made in its size."""

from collections.abc import Mapping
from typing import Any

from phasequant.errors import PhaseQuantError
from phasequant.numerics import QuantSpec, layout_shapes

ROLES = {"weights": ("channel", "group"), "kv": ("group",), "activations": ("token", "tensor", "column")}
"""What may share a scale of an integer grid, by what is quantized."""


def check_grid(spec: QuantSpec | None, role: str, width: int) -> None:
    """Raise where a grid does not suit weights, kv or activations, or its groups do not divide the width."""
    if spec is None:
        return
    kinds = {"weights": ("int", "nvfp4", "mxfp4"), "kv": ("int",)}
    suits = spec.granularity in ROLES[role] if spec.is_int else True
    if not suits or spec.kind not in kinds.get(role, (spec.kind,)) or (spec.static and role != "activations"):
        raise PhaseQuantError(f"the config gives {role} the grid '{spec}', which is not one of theirs")
    if spec.clip == "mse" and role != "weights":
        raise PhaseQuantError(f"the config gives {role} a clip that is searched, which is for weights only")
    if role != "activations":
        spec.groups(width)


def check_map(layout: Mapping[str, Any], place: str, width: int) -> None:
    """Raise where a map's layout is not of the width that it is given."""
    layout_shapes(layout)
    right = layout["right"]
    size = int(layout["blocks"]) * int(layout["left"][1]) * int(right[1] if right is not None else layout["tail"])
    flags = type(layout["diagonal"]) is bool and type(layout["orthogonal"]) is bool
    if size != width or not flags:
        raise PhaseQuantError(f"the config gives {place} a map of width {size}: it was edited; get it again")
