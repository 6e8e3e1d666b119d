"""The recipe of a checkpoint, changed so that a stock checkpoint holds all of it: nothing online, and the very grids.

    rotations       R1 and R2 folded, nothing else (rotation.online=false); smooth and os-plus fold anyway
    inputs          the profile's grid: symmetric, a scale a token, compressed-tensors' clip; not learned, not searched
    weights         the profile's kind; granularity, clip and method stay
    left away       low-rank branches, prefix, KV grid, rows of their own

Methods whose maps live online (flat, wush), and files of transforms, have no folded form: the user names a recipe.
"""

from typing import Any

from phasequant.arch import ModelMap
from phasequant.errors import PhaseQuantError
from phasequant.export.profiles import Profile, ct_clip
from phasequant.recipe import Recipe

ROTATIONS = ("quarot", "dfrot", "frtq", "spin")
FOLDED = ("none", "smooth", "os-plus")


def _check(recipe: Recipe, profile: Profile, model_map: ModelMap | None) -> None:
    method = recipe.transform.method
    if method == "spin" and profile.kind != "int":
        raise PhaseQuantError(
            f"transform.method=spin learns nothing through {profile.kind} grids: name another recipe (--recipe quarot)"
        )
    if method not in (*ROTATIONS, *FOLDED):
        raise PhaseQuantError(
            f"transform.method={method} has maps that run online and no folded form: name the recipe to quantize by "
            "instead (--recipe quarot, or smooth)"
        )
    if method in ROTATIONS and model_map is not None and model_map.unfoldable is not None:
        raise PhaseQuantError(
            f"no rotation can be folded into a {model_map.family.name} model ({model_map.unfoldable}): "
            "name a recipe without rotations (--recipe smooth, or w4a16-gptq with --set transform.method=none)"
        )


def _weights(recipe: Recipe, profile: Profile) -> dict[str, Any]:
    part = recipe.weights
    if profile.kind != "int":
        clip = "mse" if part.clip == "learned" else part.clip
        return {"bits": 4, "format": profile.kind, "granularity": "channel", "group_size": None, "symmetric": True,
                "clip": clip}  # fmt: skip
    return {"bits": 4, "format": "int", "symmetric": part.symmetric or profile.bits < 16}


def _activations(profile: Profile) -> dict[str, Any]:
    plain = {"granularity": "token", "scales": "dynamic", "symmetric": True, "token_policy": "none"}
    if profile.bits == 16 or profile.kind != "int":
        kind = {"format": "int" if profile.bits == 16 else profile.kind, "clip": 1.0}
        return {**plain, **kind, "bits": profile.bits}
    return {**plain, "format": "int", "bits": profile.bits, "clip": ct_clip(profile.bits)}


def folded(recipe: Recipe, profile: Profile, model_map: ModelMap | None = None) -> Recipe:
    """The recipe to quantize again by."""
    _check(recipe, profile, model_map)
    rotation: dict[str, Any] = {"where": "folded", "block": None}
    if recipe.transform.method in ROTATIONS:
        rotation |= {"online": False}
    policy: dict[str, Any] = {"choices": [], "allow": {}}
    exclude: dict[str, Any] = {}
    if profile.bits == 4:
        policy |= (
            {"bits": 8, "format": "int", "clip": ct_clip(8)} if profile.kind == "int" else {"bits": 16, "clip": 1.0}
        )
        exclude = {"bits": recipe.exclude.bits if profile.kind == "int" else 16}
    else:  # one grid for all: there is nothing to raise
        policy |= {"name": "uniform", "clip": 1.0}
        exclude = {"method": "none"}
    polished = [p for p in recipe.finetune.parameters if p not in ("clips", "branches")]
    finetune = {"parameters": polished} if polished else {"epochs": 0, "steps": 0}
    values = recipe.to_dict()
    for part, changes in (
        ("rotation", rotation),
        ("weights", _weights(recipe, profile)),
        ("activations", _activations(profile)),
        ("policy", policy),
        ("exclude", exclude),
        ("kv", {"bits": 16, "clip": 1.0}),
        ("lowrank", {"method": "none"}),
        ("prefix", {"method": "none", "tokens": []}),
        ("finetune", finetune),
    ):
        values[part] = {**values[part], **changes}
    return Recipe.from_dict(values)
