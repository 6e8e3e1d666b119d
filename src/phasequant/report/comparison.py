"""compare.json and compare.html: which recipe wins on one model and text, at which KV bits, and at what cost.

Differences between rows are paired: both rows read the same chunks, so the mean over chunks of the difference of their
nll comes with a standard error, s/√n, much smaller than that of either perplexity. What lies within Student's 95 %
interval is called noise. The page is `template.html.j2` with other contents, and like it loads nothing.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import StatisticsError, correlation

import jinja2

from phasequant.report.charts import FLOOR
from phasequant.report.comparison_charts import build
from phasequant.report.comparison_rows import (
    SHORTEST,
    UNIFORM,
    Json,
    all_low,
    change,
    difference,
    find,
    kv_levels,
    label,
    listed,
    number,
    paired,
    ppl,
    ranked,
    tidy,
    verdict_of,
)
from phasequant.report.page import RUNGS, finite, gaussian_gsr, plotly_bundle


def write_comparison(result: Json, folder: Path) -> Path:
    """Write compare.json and compare.html into a folder; the page's path."""
    result = finite(result)
    (folder / "compare.json").write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    page = folder / "compare.html"
    page.write_text(render(result), encoding="utf-8")
    return page


def render(result: Json) -> str:
    """The page's HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("phasequant", "report"),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("comparison.html.j2").render(context(result), plotly=plotly_bundle())


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
        "verdicts": verdicts(rows, levels),
        "asked": answered(result, rows, levels),
        "figures": finite(build(done, levels, original)),
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


def verdicts(rows: list[Json], levels: Sequence[str]) -> list[Json]:
    """Each row against the baseline, at each KV bits, on each text."""
    found = []
    for row in rows:
        for level in levels:
            figure = row["figures"].get(level)
            for text, one in ({"": figure, **(figure.get("texts") or {})} if figure else {}).items():
                if one.get("interval") is not None:
                    found.append({
                        "row": row, "level": level, "text": text, "value": one["ppl"], "ppl": number(one["ppl"], "ppl"),
                        "interval": span(one["interval"], ".2f"), "mean": (one["against"] or {}).get("mean"),
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

    lines = [{"row": {"recipe": "16-bit", "policy": ""}, "level": "16", "cells": [cell(one) for one in full.values()]}]
    lines += [
        {"row": row, "level": level, "cells": [cell((figure.get("tasks") or {}).get(task)) for task in full]}
        for row in rows for level in levels if (figure := row["figures"].get(level))
    ]  # fmt: skip
    return {"tasks": {task: one["metric"] for task, one in full.items()}, "lines": lines}


def online_share(row: Json) -> float | None:
    """Online multiply-adds as a fraction of those of the model's linears."""
    known = row["online_macs"] is not None and row["macs_total"]
    return row["online_macs"] / row["macs_total"] if known else None


def gains(rows: list[Json], levels: Sequence[str]) -> list[Json]:
    """What each plan changes against its recipe under `uniform`."""
    found = []
    for row in rows:
        base = find(rows, row["recipe"], UNIFORM)
        if row["error"] or row["policy"] == UNIFORM or base is None:
            continue
        cells: list[Json | None] = []
        for level in levels:
            value, start = ppl(row, level), ppl(base, level)
            if value is None or not start:
                cells.append(None)
                continue
            less, steps = change(value, start), paired(row, base, level)
            cells.append({"change": less, "text": f"{number(less, '+.1f')} %", "value": value,
                          "ppl": f"{number(start, 'ppl')} → {number(value, 'ppl')}",
                          "mean": steps and steps["mean"], "difference": difference(steps)})  # fmt: skip
        if any(cells):
            share = None if row["a8_share"] is None else 100 * row["a8_share"]
            found.append({"row": row, "share": share, "a8": number(share, ".1f"), "cells": cells})
    return found


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


# --- summary ------------------------------------------------------------------------------------------------------


def summary(rows: list[Json], levels: Sequence[str], original: float | None) -> list[str]:
    """The findings, a sentence each."""
    failed = [row for row in rows if row["error"]]
    if not levels:
        return [f"All {len(rows)} rows failed: the table has their messages." if rows else "There are no rows."]
    low = [row for row in rows if all_low(row)]
    sentences = [about_best(rows, level, original) for level in levels]
    if low and len(low) < len(rows) - len(failed):
        sentences.append(about_low(low, levels))
    plans = list(dict.fromkeys(row["policy"] for row in rows if row["policy"] != UNIFORM))
    sentences += [about_plan(rows, levels[-1], plan) for plan in plans]
    sentences.append(about_gsr(low, levels[-1]))
    lengths = [len(figure.get("nll") or []) for row in rows for figure in row["figures"].values()]
    if max(lengths, default=0) == 1:
        sentences.append("A single chunk was read: there is no standard error, and small differences may be noise.")
    if failed:
        sentences.append(f"{len(failed)} of {len(rows)} rows failed: the table has their messages.")
    return [sentence for sentence in sentences if sentence]


def about_best(rows: list[Json], level: str, original: float | None) -> str:
    """The winner at some KV bits, and its lead."""
    order = ranked(rows, level)
    if not order:
        return ""
    top, best = order[0], ppl(order[0], level)
    assert best is not None
    more = ""
    if original:
        way = "above" if best >= original else "below"
        more = f", {abs(change(best, original)):.1f} % {way} the 16-bit model's {number(original, 'ppl')}"
    share = f", with {100 * top['a8_share']:.1f} % of the multiply-adds in A8" if top["a8_share"] else ""
    text = f"With a {level}-bit KV cache {label(top)} reaches {number(best, 'ppl')}{more}{share}"
    text += "; " + lead(order, level) if len(order) > 1 else ""
    return text + "."


def lead(order: list[Json], level: str) -> str:
    """The best row against the best one of another recipe, or else of another plan."""
    second = next((row for row in order if row["recipe"] != order[0]["recipe"]), order[1])
    found = paired(second, order[0], level)
    if found is None:
        return f"next is {label(second)} with {number(ppl(second, level), 'ppl')}"
    error = "" if found["error"] is None else f" ± {found['error']:.4f}"
    noise = ", which is within noise" if found["noise"] else ""
    return f"it leads {label(second)} by {number(found['mean'], '.4f')}{error} nats a token{noise}"


def about_low(low: list[Json], levels: Sequence[str]) -> str:
    """The winners among the rows that read nothing in 8 bits."""
    parts = []
    for level in levels:
        if order := ranked(low, level):
            end = f"; {lead(order, level)}" if len(order) > 1 else ""
            parts.append(f"{label(order[0])} is best at KV{level} ({number(ppl(order[0], level), 'ppl')}{end})")
    return f"Without any 8-bit weight or activation, {listed(parts)}." if parts else ""


def about_plan(rows: list[Json], level: str, plan: str) -> str:
    """What a plan adds on top of each recipe."""
    found = [(cell["change"], g["row"]["recipe"], cell, g["a8"]) for g in gains(rows, [level])
             if g["row"]["policy"] == plan and (cell := g["cells"][0])]  # fmt: skip
    if not found:
        return ""
    found.sort(key=lambda entry: entry[:2])
    each = [f"{name} {cell['text']}" for _, name, cell, _ in found]
    if len(found) > 4:
        each = [*each[:2], f"{len(found) - 4} others between", *each[-2:]]
    shares = sorted({a8 for *_, a8 in found}, key=lambda text: float(text) if text != "–" else 0.0)
    share = shares[0] if len(shares) == 1 else f"{shares[0]} to {shares[-1]}"
    return f"The {plan} plan (A8 share {share} %) changes the perplexity of uniform at KV{level}: {listed(each)}."


def about_gsr(low: list[Json], level: str) -> str:
    """Spearman's rank correlation of GSR and perplexity."""
    rows = [row for row in low if row["policy"] == UNIFORM and row["gsr"] is not None]
    pairs = [(row["gsr"], value) for row in rows if (value := ppl(row, level)) is not None]
    if len(pairs) < 4:
        return ""
    ranks = [
        [(sum(v < x for v in side) + sum(v <= x for v in side)) / 2 for x in side] for side in zip(*pairs, strict=True)
    ]
    try:
        rho = correlation(*ranks)
    except StatisticsError:  # all the same
        return ""
    return (
        f"Over the {len(pairs)} uniform rows the ranks of GSR and of perplexity at KV{level} correlate with "
        f"{number(rho, '.2f')} (1: a lower GSR always means a lower perplexity)."
    )
