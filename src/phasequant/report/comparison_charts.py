"""The charts of compare.html: perplexity by recipe and plan; against GSR; against the seconds that learning took."""

import math
from collections.abc import Sequence
from typing import Any

from phasequant.report.charts import _figure, _ticks, escape
from phasequant.report.comparison_rows import FULL, SHORTEST, Json, label, number, ppl

SYMBOLS = ("circle", "diamond", "square", "triangle-up", "x", "star")
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#888888")
PLOT = (860, 300)  # pixels, about, of a chart's inside: labels are placed on it


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
