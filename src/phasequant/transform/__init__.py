"""Making activations flat: a method chooses rotations, `apply` folds them or leaves them online."""

from collections.abc import Callable

from phasequant.arch import ModelMap
from phasequant.transform.apply import apply
from phasequant.transform.contract import Transform
from phasequant.transform.quarot import quarot

METHODS: dict[str, Callable[[ModelMap, int], Transform]] = {
    "none": lambda model_map, seed: Transform("none"),
    "quarot": quarot,
}
"""Name in the recipe → (map, seed) → rotations."""

__all__ = ["METHODS", "Transform", "apply", "quarot"]
