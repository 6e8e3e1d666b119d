"""Figures of the page: parts of a report in, Plotly figures as plain dicts out.

Colours of text, grid and background are not set here: the page's script adds them for the light or the dark theme. A
trace with `meta` is drawn only while the page's controls hold those values, as in {"bits": "4"}. Plotly reads a little
HTML in texts, so what comes from tokens or reasons is escaped.
"""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from html import escape as _escape
from itertools import product
from typing import Any

Json = dict[str, Any]
escape = partial(_escape, quote=False)  # Plotly shows &quot; as it stands
FLOOR = 0.247  # GSR of a uniform row
BANDS = 6  # phases that are drawn; the table has all
HOVER = "after block %{x}: %{y:.4g}, channel %{customdata}"
ABOVE = 72  # pixels for a colour bar and its title
BIT_COLORS = ("#8fa9bf", "#D55E00", "#CC79A7", "#009E73")
SIDES = (("#D55E00", "solid"), ("#0072B2", "dash"), ("#009E73", "dot"))
GROUPS = (("#0072B2", "solid"), ("#D55E00", "dash"), ("#009E73", "dot"), ("#CC79A7", "dashdot"))
FIRST = {"without": "without_first", "with": "all_tokens"}
GSR_KINDS = {"mean": "gsr", "p99": "gsr_p99", "weight": "gsr_weight"}


def sides(report: Json) -> list[Json]:
    """The observations to compare: raw, behind the prefix if there is one, and transformed if anything was."""
    found = report["observations"]
    names = ["raw", *(["isolated"] if found.get("isolated") else []), *(["transformed"] if report["transform"] else [])]
    return [found[name] for name in names]


def planned_side(report: Json) -> Json:
    """The observations whose metrics the thresholds are of: of raw ones the last, behind the prefix."""
    found = report["observations"]
    if report["thresholds"]["coordinates"] == "raw" or not report["transform"]:
        return found.get("isolated") or found["raw"]
    return found["transformed"]


def phase_label(phase: Json) -> str:
    """Channel and kind of token."""
    return f"channel {phase['channel']}, {'first token' if phase['first_token'] else 'other tokens'}"


def bits(spec: Json | None) -> int:
    """Bits of a grid; no grid means 16."""
    return spec["bits"] if spec else 16


def bit_levels(report: Json) -> list[int]:
    """The bits that occur in any plan, in the order of `BIT_COLORS`."""
    return sorted({bits(spec) for each in report["plans"].values() for spec in (each["low"], *each["raised"].values())})


def build(report: Json) -> dict[str, Json]:
    """Every chart of the page by its id; `noise` only where it was measured."""
    makers = (norm, absmax, update, jump, snr, gsr, spikes, spiking, tokens, noise, plan)
    made = {maker.__name__: maker(report) for maker in makers}
    return {name: figure for name, figure in made.items() if figure is not None}


# --- the charts, in the page's order ------------------------------------------------------------------------------


def norm(report: Json) -> Json:
    """Mean norm of the residual by depth."""
    raw = report["observations"]["raw"]
    curves = raw["residual"]["norm"]
    series = {"all tokens": curves["all_tokens"], "without the first token": curves["without_first"]}
    data = [_line(*item, *style, x0=-1) for item, style in zip(series.items(), SIDES, strict=False)]
    axes = {"xaxis": _depth_axis(raw["blocks"]), "yaxis": _log_axis(series.values(), "mean ‖h‖")}
    return _figure(data, 300, **axes, shapes=_bands(raw["phases"]))


def absmax(report: Json) -> Json:
    """Largest magnitude of the residual by depth, above one lane for each of the strongest phases."""
    raw = report["observations"]["raw"]
    blocks, phases = raw["blocks"], raw["phases"][:BANDS]
    series = [side["residual"]["absmax"] for side in sides(report)]
    data = _by_side(report, series, x0=-1)
    for trace, side in zip(data, sides(report), strict=True):
        trace |= {"customdata": side["residual"]["absmax_channel"], "hovertemplate": HOVER}
    inner = 240 + (lanes := 24 * len(phases))  # pixels
    axis = {**_log_axis(series, "max |h|"), "domain": [(lanes + 10) / inner if lanes else 0, 1]}
    layout: Json = {"xaxis": _depth_axis(blocks), "yaxis": axis, "shapes": _bands(phases)}
    if phases:
        layout["xaxis"]["anchor"] = "y2"
        layout["yaxis2"] = {"domain": [0, lanes / inner], "range": [len(phases) - 0.5, -0.5], "visible": False}
        layout["annotations"] = [_lane_label(phase, row, blocks) for row, phase in enumerate(phases)]
    return _figure(data + [_lane(phase, row) for row, phase in enumerate(phases)], inner + 90, **layout)


def update(report: Json) -> Json:
    """Largest magnitude that each block adds."""
    series = [side["residual"]["update_absmax"] for side in sides(report)]
    return _figure(_by_side(report, series), 300, xaxis=_block_axis(report), yaxis=_log_axis(series, "max |update|"))


def _tint(phase: Json, alpha: float) -> str:
    return f"rgba(213,94,0,{alpha})" if phase["massive"] else f"rgba(120,130,140,{alpha})"


def _bands(phases: Sequence[Json]) -> list[Json]:
    spans = {(p["appears"] - 0.5, p["last"] + 0.5): _tint(p, 0.13) for p in reversed(phases[:BANDS])}
    area = {"type": "rect", "yref": "y domain", "y0": 0, "y1": 1, "line": {"width": 0}, "layer": "below"}
    return [{**area, "x0": start, "x1": end, "fillcolor": color} for (start, end), color in spans.items()]


def _lane(phase: Json, row: int) -> Json:
    text = f"{phase_label(phase)}<br>peak {phase['peak']:.5g}, {phase['times']:,.0f} × the median"
    return {"type": "bar", "orientation": "h", "yaxis": "y2", "y": [row], "base": [phase["appears"] - 0.5],
            "x": [phase["last"] - phase["appears"] + 1], "width": 0.84, "marker": {"color": _tint(phase, 0.35)},
            "showlegend": False, "hovertemplate": text + "<extra></extra>"}  # fmt: skip


def _lane_label(phase: Json, row: int, blocks: int) -> Json:
    late = phase["appears"] > 0.45 * blocks
    place = {"x": phase["last"] + 0.5, "xanchor": "right"} if late else {"x": phase["appears"] - 0.5, "xanchor": "left"}
    return {"text": phase_label(phase), "xref": "x", "yref": "y2", **place, "y": row, "xshift": -4 if late else 4}


def jump(report: Json) -> Json:
    """Jump Ratio by block; one curve, since rotations do not change it."""
    curve, limit, data = report["observations"]["raw"]["jump_ratio"], report["thresholds"]["jr"], []
    for first, key in FIRST.items():
        data += [_line("Jump Ratio", curve[key], *SIDES[0], meta={"first": first})]
        data += _marks(report, curve[key], {"first": first})
    data.append(_threshold(report, limit, f"threshold {limit:.3g}", {}))
    return _figure(data, 320, xaxis=_block_axis(report), yaxis=_log_axis([*curve.values(), [limit]], "‖Δx‖ / ‖x‖"))


def snr(report: Json) -> Json:
    """Historical Feature SNR by block, before and after the transform."""
    found, limits, data = sides(report), report["thresholds"], []
    for width, (first, key) in product(found[0]["snr"], FIRST.items()):
        series, meta = [side["snr"][width][key] for side in found], {"bits": width, "first": first}
        data += [*_by_side(report, series, meta=meta), *_marks(report, series[-1], meta)]
    where = planned_side(report)["coordinates"]
    data.append(_threshold(report, limits["snr"], f"threshold {limits['snr']:.1f} dB, {where}", {"bits": "4"}))
    return _figure(data, 340, xaxis=_block_axis(report), yaxis={"title": {"text": "SNR, dB"}})


def _marks(report: Json, series: Sequence[float], meta: Json) -> list[Json]:
    """Diamonds on the blocks that the chosen plan raises."""
    blocks = sorted({int(place.split(".")[0]) for place in report["plan"]["raised"]})
    marker = {"symbol": "diamond-open", "size": 12, "color": "#009E73", "line": {"width": 2}}
    trace = {"type": "scatter", "mode": "markers", "name": "raised by the plan", "marker": marker, "hoverinfo": "skip"}
    return [{**trace, "x": blocks, "y": [series[block] for block in blocks], "meta": meta}] if blocks else []


def _threshold(report: Json, value: float, name: str, meta: Json) -> Json:
    flat = {"x0": -1, "dx": report["model"]["blocks"] + 1, "mode": "lines", "hoverinfo": "skip", "hovertemplate": None}
    return _line(name, [value, value], "#888888", "dot", meta=meta, **flat)


def gsr(report: Json) -> Json:
    """Grid-to-std ratio, block by group, before and after the transform on one scale."""
    found, data, values = sides(report), [], [[FLOOR]]
    for (row, side), (kind, key) in product(enumerate(found), GSR_KINDS.items()):
        trace = _group_map(side, [g[key] for g in side["groups"]], "GSR %{customdata:.3f}", meta={"gsr": kind})
        values += trace["z"]
        data.append({**trace, "z": [_log(cells) for cells in trace["z"]], "yaxis": f"y{row + 1}"})
    return _maps(report, data, [side["coordinates"] for side in found], _log_colors(values), "GSR")


def spikes(report: Json) -> Json:
    """QFeM's ratio of the largest token to the median one, a line a group; its threshold, where it left groups out."""
    data, values = [], []
    for index, side in enumerate(sides(report)):
        for group, style in zip(dict.fromkeys(g["group"] for g in side["groups"]), GROUPS, strict=False):
            values.append([g["spike_ratio"] for g in side["groups"] if g["group"] == group])
            data.append(_line(group, values[-1], *style, meta={"side": str(index)}))
    alpha = report["plan"].get("alpha")
    if alpha is not None:
        values.append([alpha])
        data.append(_threshold(report, alpha, f"alpha {alpha:.4g}", {}))
    return _figure(data, 330, xaxis=_block_axis(report), yaxis=_log_axis(values, "largest / median token"))


def spiking(report: Json) -> Json | None:
    """Which token dominates which group's input, log colour; a map for each side. None in reports of older versions."""
    data, values, found = [], [], sides(report)
    if not all(side.get("spikes") for side in found):
        return None
    names = [f"{row['block']} {row['group']}" for row in found[0]["spikes"]["rows"]]
    for index, side in enumerate(found):
        spikes = side["spikes"]
        places = zip(spikes["tokens"], spikes["places"], strict=True)
        columns = [f"{_short(text)} {s}:{p}" for text, (s, p) in places]
        z = [row["times"] for row in spikes["rows"]]
        shown = [[f"channel {row['channel']}, {times:.4g}" for times in row["times"]] for row in spikes["rows"]]
        values += z
        data.append({"type": "heatmap", "x": list(range(len(columns))), "y": names, "z": [_log(row) for row in z],
                     "customdata": [[list(pair) for pair in zip(columns, row, strict=True)] for row in shown],
                     "hovertemplate": "%{customdata[0]}, input of %{y}<br>%{customdata[1]} × the median<extra></extra>",
                     "coloraxis": "coloraxis", "meta": {"side": str(index)}})  # fmt: skip
    height = min(1200, max(360, 9 * len(names) + 150))
    yaxis = {"autorange": "reversed", "type": "category", "title": {"text": "input of block, group"}}
    layout = {"yaxis": yaxis, "coloraxis": _log_colors(values), "margin": {"t": ABOVE}}
    title = _bar_title("largest value / median token's")
    return _figure(
        data, height, xaxis={"title": {"text": "token"}, "showticklabels": False}, annotations=[title], **layout
    )


def _short(text: str) -> str:
    """A token for an axis."""
    return escape(shown if len(shown := repr(text)) < 15 else shown[:12] + "…" + shown[-1])


def tokens(report: Json) -> Json:
    """Largest magnitude by depth and token, log colour."""
    found = report["observations"]["raw"]["token_map"]
    depth, height = len(found["absmax"]), min(780, max(360, 12 * len(found["absmax"]) + 230))
    names = [f"{escape(repr(t))}<br>{s}:{p}" for t, (s, p) in zip(found["tokens"], found["places"], strict=True)]
    ticks = [_short(text) for text in found["tokens"]]
    data = {"type": "heatmap", "y0": -1, "z": [_log(row) for row in found["absmax"]],
            "customdata": [[list(pair) for pair in zip(names, row, strict=True)] for row in found["absmax"]],
            "hovertemplate": "%{customdata[0]}, after block %{y}<br>%{customdata[1]:.4g}<extra></extra>",
            "coloraxis": "coloraxis"}  # fmt: skip
    xaxis = {"tickvals": list(range(len(ticks))), "ticktext": ticks, "tickangle": -90, "tickfont": {"size": 10}}
    layout = {"yaxis": _depth_axis(depth - 1), "coloraxis": _log_colors(found["absmax"]), "margin": {"t": ABOVE}}
    return _figure([data], height, **layout, xaxis=xaxis, annotations=[_bar_title("largest |h| of the token")])


def noise(report: Json) -> Json | None:
    """Noise that each group's low-bit input adds to the residual, dB; None where it was not measured."""
    side, raised = report["observations"]["transformed"], report["plan"]["raised"]
    if not all("low" in g["noise"] for g in side["groups"]):
        return None
    levels = [10 * math.log10(max(g["noise"]["low"], 1e-12)) for g in side["groups"]]
    trace = _group_map(side, levels, "%{customdata:.1f} dB")
    trace["text"] = [[str(raised.get(f"{b}.{group}", {}).get("bits", "")) for b in trace["x"]] for group in trace["y"]]
    return _maps(report, [trace], [""], {"colorscale": "Viridis"}, "noise / residual, dB")


def plan(report: Json) -> Json:
    """Bits of every group's input, a map for each plan."""
    side, levels, data = report["observations"]["raw"], bit_levels(report), []
    scale = [[(i + end) / len(levels), BIT_COLORS[i % 4]] for i in range(len(levels)) for end in (0, 1)]
    for name, entry in report["plans"].items():
        low = {"bits": bits(entry["low"]), "why": "the grid of all groups"}
        found = [entry["raised"].get(f"{g['block']}.{g['group']}", low) for g in side["groups"]]
        trace = _group_map(side, found, "%{customdata}", meta={"policy": name})
        cells: list[list[Json]] = trace["z"]
        trace["z"] = [[levels.index(cell["bits"]) for cell in row] for row in cells]
        trace["customdata"] = [[f"{cell['bits']} bits<br>{escape(cell['why'])}" for cell in row] for row in cells]
        trace["text"] = [["" if cell is low else str(cell["bits"]) for cell in row] for row in cells]
        data.append(trace)
    colors = {"colorscale": scale, "cmin": -0.5, "cmax": len(levels) - 0.5, "showscale": False}
    return _maps(report, data, [""], colors, "")


# --- shared parts -------------------------------------------------------------------------------------------------


def _line(name: str, values: Sequence[float], color: str, dash: str, **more: Any) -> Json:
    line = {"color": color, "dash": dash}
    return {"type": "scatter", "name": name, "y": values, "line": line, "hovertemplate": "block %{x}: %{y:.4g}", **more}


def _by_side(report: Json, series: Sequence[Sequence[float]], **more: Any) -> list[Json]:
    """A line for each side."""
    names = [side["coordinates"] for side in sides(report)]
    return [_line(name, row, *style, **more) for name, row, style in zip(names, series, SIDES, strict=False)]


def _group_map(side: Json, values: Sequence[Any], shown: str, **more: Any) -> Json:
    """A heat map, block by group, of a value for each entry of `groups`."""
    names = list(dict.fromkeys(entry["group"] for entry in side["groups"]))
    pairs = list(zip(side["groups"], values, strict=True))
    cells = [[value for entry, value in pairs if entry["group"] == name] for name in names]
    return {"type": "heatmap", "x": list(range(side["blocks"])), "y": names, "z": cells, "customdata": cells,
            "hovertemplate": f"block %{{x}}, %{{y}}: {shown}<extra></extra>", "texttemplate": "%{text}",
            "coloraxis": "coloraxis", "xgap": 1, "ygap": 1, **more}  # fmt: skip


def _maps(report: Json, data: list[Json], titles: Sequence[str], colors: Json, bar: str) -> Json:
    """Maps stacked over one block axis, the first on top."""
    inner = 140 * len(titles)  # pixels
    tops = [1 - 140 * row / inner for row in range(len(titles))]
    domains = [[top - 112 / inner, top] for top in tops]
    layout: Json = {f"yaxis{i}": {"domain": d, "autorange": "reversed"} for i, d in enumerate(domains, 1)}
    margin = {"t": ABOVE if bar else 8, "b": 20}
    layout |= {"annotations": [*map(_note, titles, tops), _bar_title(bar)], "coloraxis": colors, "margin": margin}
    layout["xaxis"] = {**_block_axis(report), "anchor": f"y{len(titles)}"}
    return _figure(data, inner + margin["t"] + 20, **layout)


def _note(text: str, y: float, **more: Any) -> Json:
    corner = {"xref": "paper", "yref": "paper", "x": 0, "xanchor": "left", "yanchor": "bottom"}
    return {"text": text, "y": y, **corner, **more}


def _bar_title(text: str) -> Json:
    return _note(text, 1, yshift=ABOVE - 15)


def _figure(data: list[Json], height: int, **layout: Any) -> Json:
    return {"data": data, "layout": {"height": height, **layout}}


def _depth_axis(blocks: int) -> Json:
    step = _step(blocks)
    ticks = list(range(step if step > 1 else 0, blocks, step))
    title, names = {"text": "after block (emb: the embedding)"}, ["emb", *map(str, ticks)]
    return {"title": title, "tickvals": [-1, *ticks], "ticktext": names, "range": [-1.6, blocks - 0.4]}


def _block_axis(report: Json) -> Json:
    blocks = report["model"]["blocks"]
    return {"title": {"text": "block"}, "tick0": 0, "dtick": _step(blocks), "range": [-0.6, blocks - 0.4]}


def _step(blocks: int) -> int:
    return next(step for step in (1, 2, 5, 10, 20, 50, 100, blocks) if blocks <= 14 * step)


def _log_axis(series: Iterable[Sequence[float]], title: str) -> Json:
    vals, names = _ticks(series)
    return {"type": "log", "title": {"text": title}, "tickvals": vals, "ticktext": names}


def _ticks(series: Iterable[Sequence[float]]) -> tuple[list[float], list[str]]:
    """Round numbers, the fewer the wider the span, around the positive values."""
    values = [value for row in series for value in row if value and 0 < value < math.inf] or [1.0]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    steps = ((1, 2, 3, 5, 7) if high - low < 2 else (1, 2, 5)) if high - low <= 3 else (1,)
    ticks = [step * 10.0**power for power in range(low, high + 1) for step in steps]
    return ticks, [f"{tick:,.10g}" for tick in ticks]


def _log(row: Sequence[float]) -> list[float | None]:
    return [math.log10(value) if value and value > 0 else None for value in row]


def _log_colors(series: Sequence[Sequence[float]]) -> Json:
    """A colour axis over log10 values that is labelled with the values."""
    vals, names = _ticks(series)
    logs = [value for row in series for value in _log(row) if value is not None and math.isfinite(value)] or [0.0]
    colors = {"colorscale": "Viridis", "cmin": min(logs), "cmax": max(logs)}
    return {**colors, "colorbar": {"tickvals": _log(vals), "ticktext": names}}
