"""Recipes as text: the shelf of presets and parts, YAML files, `compose`, and `a.b=c`; keys are checked in `recipe`."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from phasequant.errors import PhaseQuantError, did_you_mean


def _shelf(folder: str) -> dict[str, str]:
    root = resources.files("phasequant") / "recipes"
    root = root / folder if folder else root
    return {p.name.removesuffix(".yaml"): p.read_text() for p in root.iterdir() if p.name.endswith(".yaml")}


def presets() -> dict[str, str]:
    """Name → one line on every preset."""
    return {name: text.splitlines()[0].lstrip("# ") for name, text in sorted(_shelf("").items())}


def parts() -> dict[str, str]:
    """Name → one line on every part that recipes are composed of."""
    return {name: text.splitlines()[0].lstrip("# ") for name, text in sorted(_shelf("parts").items())}


def read(name: str) -> dict[str, Any]:
    """The keys of a preset, a part or a file, `compose` not yet applied."""
    shelf = {**_shelf("parts"), **_shelf("")}
    path = Path(name).expanduser()
    if name in shelf:
        text = shelf[name]
    elif path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PhaseQuantError(f"the recipe {name} cannot be read: {error}") from error
    elif path.suffix in (".yaml", ".yml") or "/" in name:
        raise PhaseQuantError(f"the recipe file '{name}' does not exist")
    else:
        raise PhaseQuantError(f"there is no recipe '{name}': {did_you_mean(name, _shelf(''))}; or give a YAML file")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise PhaseQuantError(f"the recipe {name} is not valid YAML: {str(error).splitlines()[0]}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise PhaseQuantError(f"the recipe {name} must be a mapping of keys, not a {type(values).__name__}")
    return values


def merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Lay `values` over `into`, part by part."""
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


def resolve(values: dict[str, Any], depth: int = 0) -> dict[str, Any]:
    """Apply `compose`: presets may compose parts, a user's file presets; no deeper."""
    names = values.pop("compose", [])
    if not isinstance(names, list):
        raise PhaseQuantError("'compose' is a list of recipe names, as in compose: [w4, kv4]")
    if names and depth > 1:
        raise PhaseQuantError("recipes compose presets, and presets parts: no deeper")
    merged: dict[str, Any] = {}
    for name in names:
        merge(merged, resolve(read(str(name)), depth + 1))
    merge(merged, values)
    return merged


def override(values: dict[str, Any], text: str) -> None:
    """Set one key, given as a.b=c."""
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise PhaseQuantError(f"--set wants key=value, as in --set weights.bits=8, not '{text}'")
    *parents, leaf = path.strip().split(".")
    target = values
    for parent in parents:
        if not isinstance(target.setdefault(parent, {}), dict):
            raise PhaseQuantError(f"--set {text}: '{parent}' is a value, not a part of the recipe")
        target = target[parent]
    try:
        target[leaf] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise PhaseQuantError(f"--set {text}: the value is not valid YAML") from error
