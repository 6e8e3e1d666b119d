"""What is more than chance in a comparison: intervals of every row, and its difference to one row, the baseline.

Both rows read the same chunks and answered the same questions, so differences are paired (`evaluate.statistics`). A row
is judged against the baseline with the same KV bits and the same seed; against its other bits or first seed where it
has no such row. Many rows against one: of 20 rows that do not differ, one is expected to look as if it did.
"""

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from phasequant.errors import PhaseQuantError, did_you_mean
from phasequant.evaluate.statistics import compare_answers, compare_nll, perplexity_interval, student

Json = dict[str, Any]


def parse_baseline(asked: str | None, rows: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """(recipe, policy) of the baseline: `recipe/policy`, a recipe alone (under its first plan), or the first row."""
    if asked is None:
        return rows[0]
    exact = next(((r, p) for r, p in rows if f"{r}/{p}" == asked), None)
    found = exact or next(((r, p) for r, p in rows if r == asked), None)
    if found is None:
        known = dict.fromkeys(f"{recipe}/{policy}" for recipe, policy in rows)
        raise PhaseQuantError(f"the baseline '{asked}' is not compared: {did_you_mean(asked, known)}")
    return found


def judged(result: Json, baseline: tuple[str, str]) -> Json:
    """The result with `interval` and `against` in every figure of rows, and figures over seeds."""
    rows = [row for row in result["rows"] if (row["recipe"], row["policy"]) == baseline]
    by_seed = {row["seed"]: row for row in rows if not row["error"]}
    first = next(iter(by_seed.values()), None)
    done = [_row(row, by_seed.get(row["seed"], first)) for row in result["rows"]]
    return {**result, "rows": done, "baseline": "/".join(baseline), "over_seeds": over_seeds(done, result["seeds"])}


def _row(row: Json, base: Json | None) -> Json:
    if row["error"]:
        return row
    levels = {}
    for bits, figure in row["figures"].items():
        other = None if base is None else base["figures"].get(bits) or base["figures"][max(base["figures"], key=int)]
        itself = base is row or (base is not None and other is figure)
        levels[bits] = _figure(figure, None if itself else other)
    return {**row, "figures": levels}


def _figure(figure: Json, base: Json | None) -> Json:
    texts = {name: _text(one, base and base["texts"].get(name)) for name, one in figure.get("texts", {}).items()}
    tasks = {name: _task(one, base and base["tasks"].get(name)) for name, one in figure.get("tasks", {}).items()}
    return {**_text(figure, base), "texts": texts, "tasks": tasks}


def _finite(figure: Json | None) -> bool:
    return figure is not None and all(value is not None and math.isfinite(value) for value in figure["nll"])


def _text(figure: Json, base: Json | None) -> Json:
    found: Json = {**figure, "interval": None, "against": None}
    if _finite(figure):
        found["interval"] = perplexity_interval(figure["nll"]).to_dict()
        if base is not None and _finite(base):
            found["against"] = compare_nll(figure["nll"], base["nll"])
    return found


def _task(figure: Json, base: Json | None) -> Json:
    if base is None:
        return {**figure, "against": None}
    found = compare_answers(figure["values"], base["values"], higher_is_better=figure["higher_is_better"])
    return {**figure, "against": found}


def over_seeds(rows: Sequence[Json], seeds: int) -> list[Json]:
    """Mean, standard deviation and Student's 95 % interval of the mean perplexity of the seeds of a recipe and plan."""
    if seeds < 2:
        return []
    found: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        for bits, figure in (row.get("figures") or {}).items():
            if figure["ppl"] is not None and math.isfinite(figure["ppl"]):
                found.setdefault((row["recipe"], row["policy"], bits), []).append(figure["ppl"])
    told = []
    for (recipe, policy, bits), values in found.items():
        mean, n = fmean(values), len(values)
        spread = stdev(values) if n > 1 else None
        half = None if spread is None else student(n - 1) * spread / math.sqrt(n)
        told.append({
            "recipe": recipe, "policy": policy, "kv": bits, "n": n, "mean": mean, "sd": spread,
            "low": None if half is None else mean - half, "high": None if half is None else mean + half,
        })  # fmt: skip
    return told
