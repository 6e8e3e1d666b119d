"""What is wanted: a recipe, its parts, and the presets on the shelf."""

from phasequant.presets import parts, presets
from phasequant.recipe.keys import (
    ActivationsPart,
    CalibrationPart,
    ExcludePart,
    FinetunePart,
    KvPart,
    LearningPart,
    LowRankPart,
    PolicyPart,
    PrefixPart,
    RotationPart,
    StoragePart,
    TransformPart,
    WeightsPart,
)
from phasequant.recipe.whole import Recipe

__all__ = [
    "ActivationsPart",
    "CalibrationPart",
    "ExcludePart",
    "FinetunePart",
    "KvPart",
    "LearningPart",
    "LowRankPart",
    "PolicyPart",
    "PrefixPart",
    "Recipe",
    "RotationPart",
    "StoragePart",
    "TransformPart",
    "WeightsPart",
    "parts",
    "presets",
]
