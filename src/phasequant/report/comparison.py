"""compare.json and compare.html: which recipe wins on one model and text, at which KV bits, and at what cost.

Differences between rows are paired: both rows read the same chunks, so the mean over chunks of the difference of their
nll comes with a standard error, s/√n, much smaller than that of either perplexity. What lies within Student's 95 %
interval is called noise. The page is `base.html.j2` with other contents than a run's, and like that loads nothing.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from phasequant.report.comparison_charts import build
from phasequant.report.comparison_findings import gains, summary
from phasequant.report.comparison_rows import (
    SHORTEST,
    Json,
    difference,
    find,
    kv_levels,
    number,
    paired,
    ppl,
    ranked,
    tidy,
    verdict_of,
)
from phasequant.report.comparison_text import MARKS
from phasequant.report.page import drawn, environment, finite
from phasequant.report.rows import RUNGS
from phasequant.report.sides import FLOOR, gaussian_gsr


def write_comparison(result: Json, folder: Path) -> Path:
    """Write compare.json and compare.html into a folder; the page's path."""
    result = finite(result)
    (folder / "compare.json").write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    page = folder / "compare.html"
    page.write_text(render(result), encoding="utf-8")
    return page


def render(result: Json) -> str:
    """The page's HTML."""
    return environment().get_template("comparison.html.j2").render(context(result))


def context(result: Json) -> Json:
    """What the template shows."""
    result = finite(result)
    rows = tidy(by_seed(result))
    done = [row for row in rows if not row["error"]]
    levels = kv_levels(rows)
    original = result["original"]["ppl"]
    raw = [row["gsr_raw"] for row in done if row["gsr_raw"]]
    groups = list(dict.fromkeys(group for row in done for group in row["gsr_by_group"]))
    return {
        "result": result,
        "model": result["model"],
        "levels": levels,
        "original": number(original, "ppl"),
        "summary": summary(rows, levels, original),
        "rows": [shown(row, rows, levels) for row in rows],
        "gains": gains(rows, levels),
        "places": places(done),
        "verdicts": verdicts(rows, levels, result["evaluation"]["text"]),
        "asked": answered(result, rows, levels),
        **drawn(finite(build(done, levels, original))),
        "state": {"kv": levels[-1] if levels else "", "gsr": "mean"},
        "groups": groups,
        "first": rows[0]["recipe"] if rows else "",
        "raw_gsr": raw[0] if raw else None,
        "gaussian": gaussian_gsr(result["model"]["d_model"]),
        "floor": FLOOR,
        "shortest": SHORTEST,
    }


# --- tables -------------------------------------------------------------------------------------------------------


def shown(row: Json, rows: list[Json], levels: Sequence[str]) -> Json:
    """One row of the large table: the text of each cell beside the number that it is sorted by."""
    base = find(rows, rows[0]["recipe"], row["policy"])
    best = {level: next(iter(ranked(rows, level)), None) for level in levels}

    def measured(level: str) -> Json:
        value = ppl(row, level)
        text = "not finite" if value is None and level in row["figures"] else number(value, "ppl")
        found = None if base is row else paired(row, base, level)
        return {"value": value, "text": text, "difference": difference(found), "best": best[level] is row}

    def cell(value: float | None, kind: str) -> Json:
        return {"value": value, "text": number(value, kind), "difference": "", "best": False}

    def scaled(key: str, factor: float) -> float | None:
        return None if row[key] is None else row[key] * factor

    share = online_share(row)
    cells = [cell(scaled("a8_share", 100), ".1f"), *map(measured, levels)]
    cells += [cell((row["figures"].get(level) or {}).get("kl"), ".4f") for level in levels]
    cells += [cell(row["gsr"], ".3f"), cell(row["seconds"], ",.1f"), cell(scaled("peak_bytes", 2**-30), ",.2f")]
    cells += [cell(None if share is None else 100 * share, ".2f"), cell(scaled("weight_bytes", 2**-20), ",.1f")]
    bits = ", ".join(filter(None, [row["bits"], row["weights"]]))
    return {**row, "bits": bits, "cells": [*cells, cell(row["kv_bytes_per_token"], ",.0f")]}


def by_seed(result: Json) -> list[Json]:
    """Rows; where there are several seeds, named by theirs."""
    if result.get("seeds", 1) < 2:
        return list(result["rows"])
    return [{**row, "recipe": f"{row['recipe']}, seed {row['seed']}"} for row in result["rows"]]


def span(found: Json | None, kind: str, factor: float = 1.0) -> str:
    """An interval as text."""
    if found is None or found.get("low") is None:
        return "–"
    return f"{number(factor * found['low'], kind)} … {number(factor * found['high'], kind)}"


def verdicts(rows: list[Json], levels: Sequence[str], first: str) -> list[Json]:
    """Each row against the baseline, at each KV bits, on each text; `first`: the text that rows are ranked by."""
    found = []
    for row in rows:
        for level in levels:
            figure = row["figures"].get(level)
            for text, one in ({first: figure, **(figure.get("texts") or {})} if figure else {}).items():
                if one.get("interval") is not None:
                    found.append({
                        "recipe": row["recipe"], "policy": row["policy"], "level": level, "source": text,
                        "text": text.rsplit("/", 1)[-1], "mark": MARKS.get(verdict_of(one["against"]), ""),
                        "value": one["ppl"], "ppl": number(one["ppl"], "ppl"),
                        "interval": span(one["interval"], "ppl"), "mean": (one["against"] or {}).get("mean"),
                        "difference": number((one["against"] or {}).get("mean"), "+.4f"),
                        "between": span(one["against"], "+.4f"), "verdict": verdict_of(one["against"]) or "baseline",
                    })  # fmt: skip
    return found


def answered(result: Json, rows: list[Json], levels: Sequence[str]) -> Json | None:
    """Accuracies of all rows and of the 16-bit model."""
    full = result["original"].get("tasks") or {}
    if not full:
        return None

    def cell(one: Json | None) -> Json:
        if one is None:
            return {"value": None, "text": "–", "small": ""}
        percent = one["metric"] != "perplexity"
        factor, kind = (100, ".1f") if percent else (1, ".2f")
        error = "" if one["error"] is None else f" ± {number(factor * one['error'], kind)}"
        found = one.get("against")
        small = verdict_of(found)
        if found is not None and percent:
            small = f"{number(factor * found['mean'], '+.1f')}, {small}"
        return {"value": one["value"], "text": number(factor * one["value"], kind) + error, "small": small}

    lines = [{"recipe": "16-bit", "policy": "", "level": "16", "cells": [cell(one) for one in full.values()]}]
    lines += [
        {"recipe": row["recipe"], "policy": row["policy"], "level": level,
         "cells": [cell((figure.get("tasks") or {}).get(task)) for task in full]}
        for row in rows for level in levels if (figure := row["figures"].get(level))
    ]  # fmt: skip
    return {"tasks": {task: one["metric"] for task, one in full.items()}, "lines": lines}


def online_share(row: Json) -> float | None:
    """Online multiply-adds as a fraction of those of the model's linears."""
    known = row["online_macs"] is not None and row["macs_total"]
    return row["online_macs"] / row["macs_total"] if known else None


def places(done: Iterable[Json]) -> list[Json]:
    """What is folded and what runs online, once for all plans of a recipe that have the same."""
    found: list[Json] = []
    for row in done:
        same = next((f for f in found if (f["recipe"], f["of"]) == (row["recipe"], row["transform"])), None)
        if same:
            same["policies"].append(row["policy"])
            continue
        parts: Json = {"folded": [], "online": []}
        for entry in row["transform"]:
            parts[entry["where"]].append({**entry, "warning": RUNGS.get(entry["rung"], "")})
        share = online_share(row)
        found.append({"recipe": row["recipe"], "of": row["transform"], "policies": [row["policy"]], **parts,
                      "macs": number(row["online_macs"], ",.0f"),
                      "share": number(None if share is None else 100 * share, ".2f")})  # fmt: skip
    counts = [entry["recipe"] for entry in found]
    return [{**entry, "split": counts.count(entry["recipe"]) > 1} for entry in found]
