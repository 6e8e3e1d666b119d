"""Recipes as text: the shelf of presets and parts, YAML files, `compose`, and `a.b=c`; keys are checked in `recipe`."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from phasequant.errors import PhaseQuantError, did_you_mean

LARGEST = 2**18  # bytes of a recipe file; the longest preset, with all its comments, has 14 thousand
DEEPEST, MOST, WIDEST = 16, 20_000, 4096  # levels, values, characters of a string
COMPOSED = 16  # names in one `compose`


def check_plain(values: Any, where: str) -> None:
    """Refuse what no recipe holds and what takes for ever to look at: deep or endless nesting (aliases that multiply
    or contain themselves), numbers of hundreds of digits. Seen at once, for counting stops early."""
    seen = 0
    level = [values]
    for _ in range(DEEPEST):
        below: list[Any] = []
        for value in level:
            seen += 1
            if isinstance(value, int) and abs(value) >= 2**63:
                raise PhaseQuantError(f"{where} holds a whole number of more than 63 bits")
            if isinstance(value, str) and len(value) > WIDEST:
                raise PhaseQuantError(f"{where} holds a text of {len(value)} characters: {WIDEST} at most")
            if isinstance(value, Mapping):
                below += [*value.keys(), *value.values()]
            elif isinstance(value, (list, tuple, set, frozenset)):
                below += value
            if seen + len(below) > MOST:
                raise PhaseQuantError(f"{where} holds more than {MOST} values")
        level = below
        if not level:
            return
    raise PhaseQuantError(f"{where} is nested more than {DEEPEST} deep")


def plain_yaml(text: str, where: str) -> Any:
    """YAML of plain values: tags that make anything else are refused, as is whatever trips the parser."""
    try:
        values = yaml.safe_load(text)
    except RecursionError as error:
        raise PhaseQuantError(f"{where} is not valid YAML: it is nested too deep") from error
    except Exception as error:  # PyYAML's own, and what Python says of !!int "", 2001-99-99 or a number too long
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise PhaseQuantError(f"{where} is not valid YAML: {said[:200]}") from error
    check_plain(values, where)
    return values


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
            if path.stat().st_size > LARGEST:
                raise PhaseQuantError(f"the recipe {name} has {path.stat().st_size} bytes: {LARGEST} at most")
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PhaseQuantError(f"the recipe {name} cannot be read: {error}") from error
    elif path.suffix in (".yaml", ".yml") or "/" in name:
        raise PhaseQuantError(f"the recipe file '{name}' does not exist")
    else:
        raise PhaseQuantError(f"there is no recipe '{name}': {did_you_mean(name, _shelf(''))}; or give a YAML file")
    values = plain_yaml(text, f"the recipe {name}")
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
    if len(names) > COMPOSED:
        raise PhaseQuantError(f"'compose' has {len(names)} names: {COMPOSED} at most")
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
    if len(parents) >= DEEPEST or len(text) > LARGEST:
        raise PhaseQuantError(f"--set {text[:200]}: no key lies so deep, and none holds so much")
    target = values
    for parent in parents:
        if not isinstance(target.setdefault(parent, {}), dict):
            raise PhaseQuantError(f"--set {text}: '{parent}' is a value, not a part of the recipe")
        target = target[parent]
    target[leaf] = plain_yaml(value, f"--set {text[:200]}: the value")
