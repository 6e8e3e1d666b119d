"""`manifest.json`: what made a checkpoint, and the hash of every file in it.

Written last, so that a directory with a manifest is whole. Loading checks sizes and hashes first: a shard cut short, a
flipped bit or an edited config is found before a number is computed from it. The model card has no hash: it is prose,
and may be edited.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from phasequant.checkpoint.guard import read_json, stays_inside
from phasequant.errors import PhaseQuantError

NAME = "manifest.json"
FORMAT = 1
CARD = "README.md"
REQUIRED = ("config.json", "plan.json", "recipe.yaml")


def file_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file of a directory but the manifest and the model card."""
    entries = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (NAME, CARD)):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        entries[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    return entries


def write(folder: Path, content: dict[str, Any]) -> None:
    """Write the manifest of a finished directory."""
    text = json.dumps({"format": FORMAT, **content, "files": file_entries(folder)}, indent=1, ensure_ascii=False)
    (folder / NAME).write_text(text + "\n", encoding="utf-8")


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint."""
    if not (folder / NAME).exists():
        raise PhaseQuantError(f"{folder} has no {NAME}: it is not a whole PhaseQuant checkpoint")
    values = read_json(folder / NAME)
    if not _well_formed(values):
        raise PhaseQuantError(f"{folder / NAME} is not a manifest of PhaseQuant's: get the checkpoint again")
    if values.get("format", FORMAT) != FORMAT:
        raise PhaseQuantError(
            f"{folder / NAME} has format {values['format']}, and this phasequant reads format {FORMAT}: install "
            f"phasequant {values['versions']['phasequant']}, which wrote it, or a newer one"
        )
    return values


def _well_formed(values: Any) -> bool:
    if not (isinstance(values, dict) and isinstance(values.get("files"), dict)):
        return False
    versions = values.get("versions")
    return (
        isinstance(versions, dict)
        and "phasequant" in versions
        and all(
            stays_inside(name) and isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys()
            for name, entry in values["files"].items()
        )
    )


def is_ours(folder: Path) -> bool:
    """Whether a directory is a checkpoint and nothing else: every file in it stands in its manifest."""
    try:
        values = read(folder)
    except PhaseQuantError:
        return False
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}
    return found <= {NAME, CARD, *values["files"]}


def check(folder: Path, *, weights_only: bool = False) -> dict[str, Any]:
    """Compare every file with the manifest, and return it. `weights_only`: config.json, the weights and their index,
    which is what a loader of Transformers has read or will read."""
    values = read(folder)
    for name in REQUIRED:
        if name not in values["files"]:
            raise PhaseQuantError(f"the manifest in {folder} does not name '{name}': it was edited; get it again")
    for path in folder.glob("*.safetensors"):
        if path.name not in values["files"]:
            raise PhaseQuantError(f"'{path.name}' in {folder} is not of this checkpoint: remove it, or get it again")
    for name, entry in values["files"].items():
        if weights_only and name != "config.json" and ".safetensors" not in name:
            continue
        path = folder / name
        if not path.is_file():
            raise PhaseQuantError(f"the checkpoint {folder} lacks '{name}': get it again")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise PhaseQuantError(
                f"'{name}' in {folder} has {size} bytes instead of {entry['bytes']}: it was cut short or edited; "
                "get it again"
            )
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                raise PhaseQuantError(
                    f"'{name}' in {folder} is not what was saved (its SHA-256 differs): it was edited or damaged; "
                    "get it again, or quantize anew"
                )
    return values


def is_checkpoint(path: Path) -> bool:
    """Whether a directory is a PhaseQuant checkpoint."""
    try:
        config = read_json(path / "config.json")
    except PhaseQuantError:
        return False
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(quantization, dict) and quantization.get("quant_method") == "phasequant"
