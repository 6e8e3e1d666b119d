"""compare.json and compare.html: which recipe wins on one model and text, at which KV bits, and at what cost.

Differences between rows are paired: both rows read the same chunks, so the mean over chunks of the difference of their
nll comes with a standard error, s/√n, much smaller than that of either perplexity. What lies within Student's 95 %
interval is called noise. The page is `template.html.j2` with other contents, and like it loads nothing.
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import StatisticsError, correlation, fmean, stdev
from typing import Any

import jinja2

from phasequant.report.charts import FLOOR, _figure, _ticks, escape
from phasequant.report.page import RUNGS, finite, gaussian_gsr, plotly_bundle

Json = dict[str, Any]
UNIFORM, FULL = "uniform", "W16A16"
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "x", "star")
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#888888")
PLOT = (860, 300)  # pixels, about, of a chart's inside: labels are placed on it
SHORTEST = 0.1  # seconds that the cost chart can show
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, two-sided, 1 to 9 degrees of freedom
BLANK: Json = {
    **dict.fromkeys(("a8_share", "gsr", "gsr_raw", "seconds", "peak_bytes", "online_macs", "macs_total")),
    **dict.fromkeys(("weight_bytes", "kv_bytes_per_token", "error")),
    **{"method": "", "policy": UNIFORM, "bits": "", "weights": "", "figures": {}, "gsr_by_group": {}, "transform": []},
}


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
    rows = tidy(result["rows"])
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
        "figures": finite(build(done, levels, original)),
        "state": {"kv": levels[-1] if levels else "", "gsr": "mean"},
        "groups": groups,
        "first": rows[0]["recipe"] if rows else "",
        "raw_gsr": raw[0] if raw else None,
        "gaussian": gaussian_gsr(result["model"]["d_model"]),
        "floor": FLOOR,
        "shortest": SHORTEST,
    }


# --- rows ---------------------------------------------------------------------------------------------------------


def tidy(rows: Iterable[Json]) -> list[Json]:
    """Rows with every key; a failed row has no figures."""
    found = [{**BLANK, **{key: value for key, value in row.items() if value is not None}} for row in rows]
    return [{**row, "figures": {} if row["error"] else {str(k): v for k, v in row["figures"].items()}} for row in found]


def kv_levels(rows: Iterable[Json]) -> list[str]:
    """The KV bits that occur, most first."""
    return sorted({level for row in rows for level in row["figures"]}, key=int, reverse=True)


def ppl(row: Json, level: str) -> float | None:
    """A row's perplexity at some KV bits; None where it was not measured, or is not finite."""
    return (row["figures"].get(level) or {}).get("ppl")


def label(row: Json) -> str:
    """Recipe and plan."""
    return f"{row['recipe']} ({row['policy']})"


def all_low(row: Json) -> bool:
    """Whether all weights and activations are read in less than 8 bits."""
    widths = re.findall(r"[WA](\d+)", row["bits"])
    return not row["a8_share"] and bool(widths) and all(int(width) < 8 for width in widths)


def ranked(rows: Iterable[Json], level: str) -> list[Json]:
    """Rows by perplexity, best first, without those that are not quantized."""
    found = [(value, row) for row in rows if row["bits"] != FULL and (value := ppl(row, level)) is not None]
    return [row for _, row in sorted(found, key=lambda pair: pair[0])]


def paired(row: Json, base: Json | None, level: str) -> Json | None:
    """Mean difference of nll, row minus base, with its standard error (None for a single chunk)."""
    if base is None:
        return None
    ours, theirs = ((one["figures"].get(level) or {}).get("nll") or [] for one in (row, base))
    if not ours or len(ours) != len(theirs) or None in ours or None in theirs:
        return None
    steps = [a - b for a, b in zip(ours, theirs, strict=True)]
    error = stdev(steps) / math.sqrt(len(steps)) if len(steps) > 1 else None
    bound = (T95[len(steps) - 2] if len(steps) - 2 < len(T95) else 2.2) * error if error is not None else 0.0
    return {"mean": fmean(steps), "error": error, "noise": error is not None and abs(fmean(steps)) <= bound}


def find(rows: Iterable[Json], recipe: str, policy: str) -> Json | None:
    """The row of a recipe under a policy."""
    return next((row for row in rows if (row["recipe"], row["policy"]) == (recipe, policy)), None)


# --- text ---------------------------------------------------------------------------------------------------------


def number(value: float | None, kind: str) -> str:
    """A figure as text, with a real minus; a dash where there is none."""
    if value is None:
        return "–"
    if kind == "ppl":
        return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"
    return f"{value:{kind}}".replace("-", "−")


def difference(found: Json | None) -> str:
    """As in −0.0123 ± 0.0045."""
    if found is None:
        return ""
    error = "" if found["error"] is None else f" ± {found['error']:.4f}"
    return number(found["mean"], "+.4f") + error + (", noise" if found["noise"] else "")


def change(value: float, base: float) -> float:
    """Percent."""
    return 100 * (value / base - 1)


def listed(parts: Sequence[str]) -> str:
    """As in: a, b and c."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


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


# --- charts -------------------------------------------------------------------------------------------------------


def build(done: list[Json], levels: Sequence[str], original: float | None) -> dict[str, Json]:
    """The charts by id; one that would be empty is left out."""
    values = [value for row in done for level in levels if (value := ppl(row, level)) is not None]
    if not values:
        return {}
    span = _log_range([*values, original] if original else values)
    groups = list(dict.fromkeys(group for row in done for group in row["gsr_by_group"]))
    kinds = {"mean": {id(row): row["gsr"] for row in done}}
    kinds |= {group: {id(row): row["gsr_by_group"].get(group) for row in done} for group in groups}
    seconds = {id(r): None if r["seconds"] is None else max(r["seconds"], SHORTEST) for r in done}
    read = [row for row in done if row["bits"] != FULL]  # nothing is learned or gridded there
    made = {
        "ppl": dots(done, levels, original, span),
        "gsr": scatter(read, levels, original, span, kinds, "GSR of the linears' inputs (4 bits)", log=False),
        "cost": scatter(read, levels, original, span, {"": seconds}, "seconds to learn the transform", log=True),
    }
    return {name: figure for name, figure in made.items() if figure["data"]}


def dots(done: list[Json], levels: Sequence[str], original: float | None, span: list[float]) -> Json:
    """A line a recipe, a dot a plan."""
    names, policies = (list(dict.fromkeys(row[key] for row in done)) for key in ("recipe", "policy"))
    step, data = 0.5 / max(len(policies), 2), []
    for level in levels:
        for index, policy in enumerate(policies):
            rows = [row for row in done if row["policy"] == policy and ppl(row, level) is not None]
            shift = (index - (len(policies) - 1) / 2) * step
            points = [(ppl(row, level), names.index(row["recipe"]) + shift) for row in rows]
            data.append(_points(policy, index, points, [_hover(row, level) for row in rows], {"kv": level}))
    yaxis = {
        "tickvals": list(range(len(names))),
        "ticktext": list(map(escape, names)),
        "range": [len(names) - 0.5, -0.5],
    }
    layout = {"xaxis": _axis("perplexity", span, log=True), "yaxis": yaxis, "margin": {"t": 44}, "showlegend": True}
    line = {"x0": original, "x1": original, "xref": "x", "y0": 0, "y1": 1, "yref": "paper"}
    note = {"x": original and math.log10(original), "xref": "x", "xanchor": "left", "xshift": 4}
    note |= {"y": 0, "yref": "paper", "yanchor": "bottom"}
    height = 110 + len(names) * max(30, 14 * len(policies))
    return _figure([trace for trace in data if trace["x"]], height, **layout, **_reference(original, line, note))


def scatter(
    done: list[Json], levels: Sequence[str], original: float | None, span: list[float],
    kinds: dict[str, dict[int, float | None]], title: str, *, log: bool,
) -> Json:  # fmt: skip
    """Perplexity against one figure a row; `kinds`: that figure's variants, by row."""
    policies, data = list(dict.fromkeys(row["policy"] for row in done)), []
    known = [value for each in kinds.values() for value in each.values() if value is not None]
    if not known:
        return _figure([], PLOT[1])
    room = 0.06 * (max(known) - min(known) or max(known) or 1)
    wide = _log_range(known, 0.08) if log else [min(known) - room, max(known) + room]
    for level, (kind, by_row) in ((level, item) for level in levels for item in kinds.items()):
        found = [(row, by_row[id(row)], ppl(row, level)) for row in done]
        rows = [row for row, x, y in found if x is not None and y is not None]
        spots = [(x, y) for _, x, y in found if x is not None and y is not None]
        texts = _labels(rows, [(_part(x, wide, log), 1 - _part(y, span, True)) for x, y in spots])
        for index, policy in enumerate(policies):
            own = [i for i, row in enumerate(rows) if row["policy"] == policy]
            hover = [f"{_hover(rows[i], level)}<br>{spots[i][0]:,.4g}{' s' if log else ' GSR'}" for i in own]
            meta = {"kv": level, "gsr": kind} if kind else {"kv": level}
            trace = _points(policy, index, [spots[i] for i in own], hover, meta)
            trace |= {"mode": "markers+text", "text": [texts[i][0] for i in own], "cliponaxis": False,
                      "textposition": [texts[i][1] for i in own], "textfont": {"size": 11}}  # fmt: skip
            data.append(trace)
    layout = {"xaxis": _axis(title, wide, log=log), "yaxis": _axis("perplexity", span, log=True), "showlegend": True}
    line = {"y0": original, "y1": original, "yref": "y", "x0": 0, "x1": 1, "xref": "paper"}
    note = {"y": original and math.log10(original), "yref": "y", "x": 1, "xanchor": "right", "xref": "paper"}
    note["yanchor"] = "top"  # nothing is drawn below the 16-bit model
    layout |= {"margin": {"t": 44}, **_reference(original, line, note)}
    return _figure([trace for trace in data if trace["x"]], PLOT[1] + 90, **layout)


def _points(name: str, index: int, points: Sequence[Any], hover: list[str], meta: Json) -> Json:
    xs, ys = ([point[side] for point in points] for side in (0, 1))
    marker = {"symbol": SYMBOLS[index % 6], "size": 10}  # of the line's colour, which the page's script adapts
    return {"type": "scatter", "mode": "markers", "name": escape(name), "x": xs, "y": ys, "customdata": hover,
            "line": {"color": COLORS[index % 6]}, "marker": marker, "hovertemplate": "%{customdata}<extra></extra>",
            "meta": meta}  # fmt: skip


def _hover(row: Json, level: str) -> str:
    return f"{escape(label(row))}<br>perplexity {number(ppl(row, level), 'ppl')} at KV{level}"


def _reference(original: float | None, line: Json, note: Json) -> Json:
    """A dotted line at the 16-bit model's perplexity."""
    if not original:
        return {}
    shape = {"type": "line", "line": {"color": "#888888", "dash": "dot", "width": 1.5}, "layer": "below", **line}
    text = f"16-bit {number(original, 'ppl')}"
    return {"shapes": [shape], "annotations": [{"text": text, **note}]}


def _log_range(values: Sequence[float], room: float = 0.05) -> list[float]:
    low, high = math.log10(min(values)), math.log10(max(values))
    return [low - room * (high - low or 0.5), high + room * (high - low or 0.5)]


def _axis(title: str, span: list[float], *, log: bool) -> Json:
    axis: Json = {"title": {"text": title}, "range": span}
    if not log:
        return axis
    low, high = (10**end for end in span)
    if high < 4 * low:  # steps as on a linear axis
        wish = (high - low) / 6
        unit = 10.0 ** math.floor(math.log10(wish))
        step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= wish)
        ticks = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
        names = [f"{tick:,.6g}" for tick in ticks]
    elif high < 40 * low:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
        ticks = [step * 10.0**power for power in powers for step in (1, 1.5, 2, 3, 4, 5, 7)]
        names = [f"{tick:,.6g}" for tick in ticks]
    else:
        ticks, names = _ticks([[low, high]])
    return {**axis, "type": "log", "tickvals": ticks, "ticktext": names}


def _part(value: float, span: list[float], log: bool) -> float:
    return ((math.log10(value) if log else value) - span[0]) / (span[1] - span[0])


def _labels(rows: list[Json], places: list[tuple[float, float]]) -> list[tuple[str, str]]:
    """A recipe's name beside its first dot, on the first side where it covers nothing; none where there is no room."""
    dots = [(x * PLOT[0], y * PLOT[1]) for x, y in places]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in dots]
    found, named = [], set()
    for row, (x, y) in zip(rows, dots, strict=True):
        text, wide = "", 6.6 * len(row["recipe"])
        sides = {"middle right": (x + 8, y - 7), "middle left": (x - 8 - wide, y - 7),
                 "top center": (x - wide / 2, y - 22), "bottom center": (x - wide / 2, y + 8)}  # fmt: skip
        side = "middle right"
        for name, (left, top) in sides.items() if row["recipe"] not in named else ():
            box = (left, top, left + wide, top + 14)
            inside = left >= 0 and box[2] <= PLOT[0]
            if inside and all(box[2] < a or c < left or box[3] < b or d < top for a, b, c, d in taken):
                text, side = escape(row["recipe"]), name
                taken.append(box)
                named.add(row["recipe"])
                break
        found.append((text, side))
    return found
