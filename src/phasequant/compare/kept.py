"""The folder of a comparison: finished rows, each under a hash of all that it depends on."""

import hashlib
import json
from pathlib import Path
from typing import Any

from phasequant.errors import PhaseQuantError
from phasequant.recipe import Recipe

ROWS = "rows"
FILES = {ROWS, "compare.json", "compare.html"}


def is_comparison(folder: Path) -> bool:
    """Whether a directory is an earlier comparison (finished or not) and nothing else."""
    return folder.is_dir() and {p.name for p in folder.iterdir()} <= FILES


def open_folder(output: str | Path) -> Path:
    """The folder, made if need be; refused where it holds something else."""
    folder = Path(output).expanduser().resolve()
    if folder.exists() and not is_comparison(folder):
        raise PhaseQuantError(f"the output {folder} holds other files: name a new directory, or an earlier comparison")
    try:
        (folder / ROWS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PhaseQuantError(f"the output {folder} cannot be made: {error.strerror or error}") from error
    return folder


class Rows:
    """Finished rows on disk."""

    def __init__(self, folder: Path, work: dict[str, Any]) -> None:
        self.folder, self.work = folder / ROWS, work

    def path(self, recipe: Recipe) -> Path:
        """Where a recipe (its policy and seed included) has its row."""
        text = json.dumps({**self.work, "recipe": recipe.to_dict()}, sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"

    def read(self, recipe: Recipe) -> dict[str, Any] | None:
        """A finished row, if there is one."""
        try:
            found: dict[str, Any] = json.loads(self.path(recipe).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found

    def write(self, recipe: Recipe, row: dict[str, Any]) -> None:
        """Keep a row: whole or not at all."""
        path = self.path(recipe)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
        partial.replace(path)
