"""Figures of the page: parts of a report in, Plotly figures as plain dicts out.

Colours of text, grid and background are not set here: the page's script adds them for the light or the dark theme. A
trace with `meta` is drawn only while the page's controls hold those values, as in {"bits": "4"}. Plotly reads a little
HTML in texts, so what comes from tokens or reasons is escaped.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

Json = dict[str, Any]
FLOOR = 0.247  # GSR of a uniform row
BANDS = 6  # phases that are drawn; the table has all
ABOVE = 72  # pixels for a colour bar and its title
BIT_COLORS = ("#8fa9bf", "#D55E00", "#CC79A7", "#009E73")
SIDES = (("#D55E00", "solid"), ("#0072B2", "dash"))
GROUPS = (("#0072B2", "solid"), ("#D55E00", "dash"), ("#009E73", "dot"), ("#CC79A7", "dashdot"))
FIRST = {"without": "without_first", "with": "all_tokens"}
GSR_KINDS = {"mean": "gsr", "p99": "gsr_p99", "weight": "gsr_weight"}


def sides(report: Json) -> list[Json]:
    """The observations to compare: raw and transformed, or raw alone where nothing was transformed."""
    found = report["observations"]
    return [found["raw"], found["transformed"]] if report["transform"] else [found["raw"]]


def phase_label(phase: Json) -> str:
    """Channel and kind of token."""
    return f"channel {phase['channel']}, {'first token' if phase['first_token'] else 'other tokens'}"


def bit_levels(report: Json) -> list[int]:
    """The bits that occur in any plan, in the order of `BIT_COLORS`."""
    plans = report["plans"].values()
    return sorted({*map(_low, plans), *(entry["bits"] for plan in plans for entry in plan["raised"].values())})


def build(report: Json) -> dict[str, Json]:
    """Every chart of the page by its id; `noise` only where it was measured."""
    makers = (norm, absmax, update, jump, snr, gsr, spikes, tokens, noise, plan)
    made = {maker.__name__: maker(report) for maker in makers}
    return {name: figure for name, figure in made.items() if figure is not None}


# --- the residual stream ------------------------------------------------------------------------------------------


def norm(report: Json) -> Json:
    """Mean norm of the residual by depth."""
    raw = report["observations"]["raw"]
    curves = raw["residual"]["norm"]
    series = {"all tokens": curves["all_tokens"], "without the first token": curves["without_first"]}
    data = [_line(*item, *style, x0=-1) for item, style in zip(series.items(), SIDES, strict=True)]
    layout = {"xaxis": _depth_axis(raw["blocks"]), "yaxis": _log_axis(series.values(), "mean ‖h‖")}
    return _figure(data, 300, **layout, shapes=_bands(raw["phases"]))


def absmax(report: Json) -> Json:
    """Largest magnitude of the residual by depth, above one lane for each of the strongest phases."""
    raw = report["observations"]["raw"]
    blocks, phases = raw["blocks"], raw["phases"][:BANDS]
    data = _by_side(report, lambda side: side["residual"]["absmax"], x0=-1)
    for trace, side in zip(data, sides(report), strict=True):
        trace["customdata"] = side["residual"]["absmax_channel"]
        trace["hovertemplate"] = "%{y:.4g} in channel %{customdata}"
    lanes = 24 * len(phases)
    inner = 240 + lanes
    axis = {**_log_axis([trace["y"] for trace in data], "max |h|"), "domain": [(lanes + 10) / inner if lanes else 0, 1]}
    layout: Json = {"xaxis": _depth_axis(blocks), "yaxis": axis, "shapes": _bands(phases)}
    if phases:
        layout["xaxis"]["anchor"] = "y2"
        layout["yaxis2"] = {"domain": [0, lanes / inner], "range": [len(phases) - 0.5, -0.5], "visible": False}
        layout["annotations"] = [_lane_label(phase, row, blocks) for row, phase in enumerate(phases)]
    return _figure(data + [_lane(phase, row) for row, phase in enumerate(phases)], inner + 90, **layout)


def update(report: Json) -> Json:
    """Largest magnitude that each block adds."""
    data = _by_side(report, lambda side: side["residual"]["update_absmax"])
    return _figure(data, 300, xaxis=_block_axis(report), yaxis=_log_axis([t["y"] for t in data], "max |update|"))


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
    x, anchor = (phase["last"] + 0.4, "right") if late else (phase["appears"] - 0.4, "left")
    return {"text": phase_label(phase), "xref": "x", "yref": "y2", "x": x, "xanchor": anchor, "y": row}


# --- where blocks jump --------------------------------------------------------------------------------------------


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
    for bits in found[0]["snr"]:
        for first, key in FIRST.items():
            meta = {"bits": bits, "first": first}
            data += _by_side(report, lambda side, b=bits, k=key: side["snr"][b][k], meta=meta)
            data += _marks(report, found[-1]["snr"][bits][key], meta)
    where = found[0] if limits["coordinates"] == "raw" else found[-1]
    name = f"threshold {limits['snr']:.1f} dB, {where['coordinates']}"
    data.append(_threshold(report, limits["snr"], name, {"bits": "4"}))
    return _figure(data, 340, xaxis=_block_axis(report), yaxis={"title": {"text": "SNR, dB"}})


def _marks(report: Json, series: Sequence[float], meta: Json) -> list[Json]:
    """Diamonds on the blocks that the chosen plan raises."""
    found: dict[int, list[str]] = {}
    for place in report["plan"]["raised"]:
        block, _, group = place.partition(".")
        found.setdefault(int(block), []).append(group)
    marker = {"symbol": "diamond-open", "size": 12, "color": "#009E73", "line": {"width": 2}}
    return [{"type": "scatter", "mode": "markers", "name": "raised by the plan", "x": list(found), "marker": marker,
             "y": [series[block] for block in found], "customdata": [", ".join(groups) for groups in found.values()],
             "hovertemplate": "%{customdata}", "meta": meta}] if found else []  # fmt: skip


def _threshold(report: Json, value: float, name: str, meta: Json) -> Json:
    flat = {"x0": -1, "dx": report["model"]["blocks"] + 1, "mode": "lines", "hoverinfo": "skip", "hovertemplate": None}
    return _line(name, [value, value], "#888888", "dot", meta=meta, **flat)


# --- what each linear reads ---------------------------------------------------------------------------------------


def gsr(report: Json) -> Json:
    """Grid-to-std ratio, block by group, before and after the transform on one scale."""
    found, data, values = sides(report), [], [[FLOOR]]
    for row, side in enumerate(found):
        for kind, key in GSR_KINDS.items():
            trace = _group_map(side, lambda g, k=key: g[k], "GSR %{customdata:.3f}", meta={"gsr": kind})
            values += trace["z"]
            data.append({**trace, "z": [_log(cells) for cells in trace["z"]], "yaxis": f"y{row + 1}"})
    return _maps(report, data, [side["coordinates"] for side in found], _log_colors(values), "GSR")


def spikes(report: Json) -> Json:
    """QFeM's ratio of the largest token to the median one, a line a group."""
    data, values = [], []
    for index, side in enumerate(sides(report)):
        for group, style in zip(_group_names(side), GROUPS, strict=False):
            values.append([g["spike_ratio"] for g in side["groups"] if g["group"] == group])
            data.append(_line(group, values[-1], *style, meta={"side": str(index)}))
    return _figure(data, 330, xaxis=_block_axis(report), yaxis=_log_axis(values, "largest / median token"))


def tokens(report: Json) -> Json:
    """Largest magnitude by depth and token, log colour."""
    found = report["observations"]["raw"]["token_map"]
    depth, height = len(found["absmax"]), min(780, max(360, 12 * len(found["absmax"]) + 230))
    names = [f"{escape(repr(t))}<br>{s}:{p}" for t, (s, p) in zip(found["tokens"], found["places"], strict=True)]
    ticks = [escape(shown if len(shown := repr(t)) < 15 else shown[:12] + "…" + shown[-1]) for t in found["tokens"]]
    data = {"type": "heatmap", "y0": -1, "z": [_log(row) for row in found["absmax"]],
            "customdata": [[list(pair) for pair in zip(names, row, strict=True)] for row in found["absmax"]],
            "hovertemplate": "%{customdata[0]}, after block %{y}<br>%{customdata[1]:.4g}<extra></extra>",
            "coloraxis": "coloraxis"}  # fmt: skip
    xaxis = {"tickvals": list(range(len(ticks))), "ticktext": ticks, "tickangle": -90, "tickfont": {"size": 10}}
    layout = {"coloraxis": _log_colors(found["absmax"]), "annotations": [_bar_title("largest |h| of the token")]}
    return _figure([data], height, xaxis=xaxis, yaxis=_depth_axis(depth - 1), **layout, margin={"t": ABOVE})


def noise(report: Json) -> Json | None:
    """Noise that each group's low-bit input adds to the residual, dB; None where it was not measured."""
    side, raised = report["observations"]["transformed"], report["plan"]["raised"]
    if not all("low" in g["noise"] for g in side["groups"]):
        return None
    trace = _group_map(side, lambda g: 10 * math.log10(max(g["noise"]["low"], 1e-30)), "%{customdata:.1f} dB")
    trace["text"] = [[str(raised.get(f"{b}.{group}", {}).get("bits", "")) for b in trace["x"]] for group in trace["y"]]
    trace["texttemplate"] = "%{text}"
    return _maps(report, [trace], [""], {"colorscale": "Viridis"}, "noise / residual, dB")


def plan(report: Json) -> Json:
    """Bits of every group's input, a map for each plan."""
    side, levels, data = report["observations"]["raw"], bit_levels(report), []
    scale = [[(i + end) / len(levels), BIT_COLORS[i % 4]] for i in range(len(levels)) for end in (0, 1)]
    for name, entry in report["plans"].items():
        low, raised = {"bits": _low(entry), "why": "the grid of all groups"}, entry["raised"]
        trace = _group_map(side, lambda g, r=raised, o=low: r.get(f"{g['block']}.{g['group']}", o), "%{customdata}")
        cells, trace["texttemplate"], trace["meta"] = trace["z"], "%{text}", {"policy": name}
        trace["z"] = [[levels.index(cell["bits"]) for cell in row] for row in cells]
        trace["customdata"] = [[f"{cell['bits']} bits<br>{escape(cell['why'])}" for cell in row] for row in cells]
        trace["text"] = [["" if cell is low else str(cell["bits"]) for cell in row] for row in cells]
        data.append(trace)
    colors = {"colorscale": scale, "cmin": -0.5, "cmax": len(levels) - 0.5, "showscale": False}
    return _maps(report, data, [""], colors, "")


# --- shared parts -------------------------------------------------------------------------------------------------


def _low(plan: Json) -> int:
    return plan["low"]["bits"] if plan["low"] else 16


def _group_names(side: Json) -> list[str]:
    return list(dict.fromkeys(entry["group"] for entry in side["groups"]))


def _line(name: str, values: Sequence[float], color: str, dash: str, **more: Any) -> Json:
    line = {"color": color, "dash": dash}
    return {"type": "scatter", "name": name, "y": values, "line": line, "hovertemplate": "%{y:.4g}", **more}


def _by_side(report: Json, pick: Callable[[Json], list[float]], **more: Any) -> list[Json]:
    """A line for each side."""
    picked = [(side["coordinates"], pick(side)) for side in sides(report)]
    return [_line(*item, *style, **more) for item, style in zip(picked, SIDES, strict=False)]


def _group_map(side: Json, pick: Callable[[Json], Any], shown: str, **more: Any) -> Json:
    """A heat map, block by group, of what `pick` reads from each group."""
    names = _group_names(side)
    cells = [[pick(g) for g in side["groups"] if g["group"] == name] for name in names]
    hover = f"block %{{x}}, %{{y}}: {shown}<extra></extra>"
    return {"type": "heatmap", "x": list(range(side["blocks"])), "y": names, "z": cells, "customdata": cells,
            "hovertemplate": hover, "xgap": 1, "ygap": 1, "coloraxis": "coloraxis", **more}  # fmt: skip


def _maps(report: Json, data: list[Json], titles: Sequence[str], colors: Json, bar: str) -> Json:
    """Maps stacked over one block axis, the first on top."""
    inner, layout = 140 * len(titles), {}  # pixels
    tops = [1 - 140 * row / inner for row in range(len(titles))]
    for row, top in enumerate(tops):
        layout[f"yaxis{row + 1}"] = {"domain": [top - 112 / inner, top], "autorange": "reversed"}
    corner = {"xref": "paper", "yref": "paper", "x": 0, "xanchor": "left", "yanchor": "bottom"}
    notes = [{**corner, "text": title, "y": top} for title, top in zip(titles, tops, strict=True)]
    above = ABOVE if bar else 8
    layout |= {"annotations": [*notes, _bar_title(bar)], "coloraxis": colors, "margin": {"t": above, "b": 20}}
    layout["xaxis"] = {**_block_axis(report), "anchor": f"y{len(titles)}"}
    return _figure(data, inner + above + 20, **layout)


def _bar_title(text: str) -> Json:
    return {"text": text, "xref": "paper", "yref": "paper", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom",
            "yshift": ABOVE - 18}  # fmt: skip


def _figure(data: list[Json], height: int, **layout: Any) -> Json:
    return {"data": data, "layout": {"height": height, **layout}}


def _depth_axis(blocks: int, title: str = "after block (emb: the embedding)") -> Json:
    step = _step(blocks)
    ticks = list(range(step if step > 1 else 0, blocks, step))
    return {"title": {"text": title}, "tickvals": [-1, *ticks], "ticktext": ["emb", *map(str, ticks)],
            "range": [-1.6, blocks - 0.4]}  # fmt: skip


def _block_axis(report: Json) -> Json:
    blocks = report["model"]["blocks"]
    return {"title": {"text": "block"}, "tick0": 0, "dtick": _step(blocks), "range": [-0.6, blocks - 0.4]}


def _step(blocks: int) -> int:
    return next(step for step in (1, 2, 5, 10, 20, 50, 100, blocks) if blocks <= 14 * step)


def _log_axis(series: Iterable[Sequence[float]], title: str) -> Json:
    vals, names = _ticks(series)
    return {"type": "log", "title": {"text": title}, "tickvals": vals, "ticktext": names}


def _ticks(series: Iterable[Sequence[float]]) -> tuple[list[float], list[str]]:
    """Round numbers, 1-2-5 or only powers of ten, that span the positive values."""
    values = [value for row in series for value in row if value and 0 < value < math.inf] or [1.0]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    steps = (1, 2, 5) if high - low <= 3 else (1,)
    ticks = [step * 10.0**power for power in range(low, high + 1) for step in steps]
    return ticks, [f"{tick:,.10g}" for tick in ticks]


def _log(row: Sequence[float]) -> list[float | None]:
    return [math.log10(value) if value and value > 0 else None for value in row]


def _log_colors(series: Sequence[Sequence[float]]) -> Json:
    """A colour axis over log10 values that is labelled with the values."""
    vals, names = _ticks(series)
    logs = [value for row in series for value in _log(row) if value is not None and math.isfinite(value)] or [0.0]
    bar = {"tickvals": _log(vals), "ticktext": names}
    return {"colorscale": "Viridis", "cmin": min(logs), "cmax": max(logs), "colorbar": bar}
