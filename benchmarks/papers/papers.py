"""The papers' tables as data: YAML files here, one a paper, checked as they are read.

A paper has `recipes` (a preset and what is set in it, and in what it differs from the paper) and `tables`; a table has
`metrics` and `rows`; a row has a recipe, a policy, and figures published by model. The row without a policy is the
16-bit model. Metrics: `perplexity` on a text of that name, `accuracy` (mean of the table's tasks, %), `ratio` (GSR),
and `external`: what is not measured by the runner, with a note that says how else.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from phasequant import PhaseQuantError
from phasequant.recipe import Recipe

HERE = Path(__file__).resolve().parent
KINDS = ("perplexity", "accuracy", "ratio", "external")
POLICIES = (None, "uniform", "paper")


@dataclass(frozen=True)
class Row:
    """A row of a table. `published`: model → metric → figure; `claims`: changes that are stated against another row."""

    method: str
    recipe: str
    published: Mapping[str, Mapping[str, float]]
    weights: str = ""
    policy: str | None = None
    claims: tuple[Mapping[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """Method and weights."""
        return f"{self.method}, {self.weights}" if self.weights else self.method


@dataclass(frozen=True)
class Table:
    """One table of a paper. `overrides`: what all of its recipes are set to beside their own."""

    title: str
    metrics: Mapping[str, str]
    rows: tuple[Row, ...]
    note: str = ""
    tasks: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()

    @property
    def models(self) -> list[str]:
        """Models that it has figures of, in its order."""
        return list(dict.fromkeys(model for row in self.rows for model in row.published))

    @property
    def measured(self) -> list[str]:
        """Metrics that the runner measures."""
        return [name for name, kind in self.metrics.items() if kind != "external"]

    @property
    def full(self) -> Row | None:
        """The row of the 16-bit model."""
        return next((row for row in self.rows if row.policy is None), None)


@dataclass(frozen=True)
class Paper:
    """A paper: where its figures are from, what of its protocol is known and what inferred, its recipes and tables."""

    title: str
    source: str
    known: tuple[str, ...]
    inferred: tuple[str, ...]
    recipes: Mapping[str, Mapping[str, Any]]
    tables: Mapping[str, Table] = field(default_factory=dict)

    def recipe(self, name: str, table: Table, more: tuple[str, ...] = ()) -> Recipe:
        """A row's recipe, as our loader reads it."""
        made = self.recipes[name]
        return Recipe.load(made["preset"], [*made.get("set", []), *table.overrides, *more])

    def differs(self, name: str) -> list[str]:
        """In what a recipe is not the paper's, as far as is known."""
        return list(self.recipes[name].get("differs", []))


def papers() -> list[str]:
    """The names of the papers here."""
    return sorted(path.stem for path in HERE.glob("*.yaml") if path.stem != "models")


def models() -> dict[str, dict[str, Any]]:
    """Model → what its config.json says."""
    found: dict[str, dict[str, Any]] = yaml.safe_load((HERE / "models.yaml").read_text(encoding="utf-8"))
    return found


def read(name: str) -> Paper:
    """A paper's file, checked: rows name recipes, models and metrics that there are."""
    if name not in papers():
        raise PhaseQuantError(f"there is no paper '{name}' here: there are {', '.join(papers())}")
    raw = yaml.safe_load((HERE / f"{name}.yaml").read_text(encoding="utf-8"))
    tables = {key: _table(f"{name}, table {key}", one, set(raw["recipes"])) for key, one in raw["tables"].items()}
    return Paper(raw["title"], raw["source"], tuple(raw["known"]), tuple(raw["inferred"]), raw["recipes"], tables)


def _table(where: str, raw: Mapping[str, Any], recipes: set[str]) -> Table:
    rows = tuple(Row(**{**row, "claims": tuple(row.get("claims", ()))}) for row in raw["rows"])
    found = Table(
        raw["title"], raw["metrics"], rows, raw.get("note", ""), tuple(raw.get("tasks", ())), tuple(raw.get("set", ()))
    )
    known = models()
    methods = [row.method for row in rows]
    for row in rows:
        stated = {(model, metric) for model, figures in row.published.items() for metric in figures}
        stated |= {(claim["model"], claim["metric"]) for claim in row.claims}
        wrong = [model for model, _ in stated if model not in known]
        if any(kind != "external" for kind in found.metrics.values()):
            wrong += [metric for _, metric in stated if metric not in found.metrics]
        wrong += [row.recipe] if row.recipe not in recipes else []
        wrong += [str(row.policy)] if row.policy not in POLICIES else []
        wrong += [claim["against"] for claim in row.claims if claim["against"] not in methods]
        if wrong:
            raise PhaseQuantError(f"{where}, row '{row.name}': '{wrong[0]}' is not known")
    if set(found.metrics.values()) - set(KINDS):
        raise PhaseQuantError(f"{where}: metrics are of the kinds {', '.join(KINDS)}")
    return found


def matching(model: str | Path) -> list[str]:
    """Which of the papers' models a directory holds, by its config.json; none for anything else."""
    path = Path(model).expanduser() / "config.json"
    if not path.is_file():
        return []
    config = json.loads(path.read_text(encoding="utf-8"))
    scaled = config.get("rope_scaling") or config.get("rope_parameters") or {}
    config["plain_rope"] = scaled.get("rope_type", scaled.get("type", "default")) == "default"
    config.setdefault("tie_word_embeddings", False)
    return [name for name, asked in models().items() if all(config.get(key) == value for key, value in asked.items())]
