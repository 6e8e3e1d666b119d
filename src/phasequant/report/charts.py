"""The page's curves by depth and block: the residual stream with its phases, jumps, and what they drown."""

from collections.abc import Sequence
from itertools import product
from typing import Any

from phasequant.report import maps
from phasequant.report.figures import (
    Json,
    block_axis,
    depth_axis,
    figure,
    line,
    linear_axis,
    log_axis,
    panel,
    rule,
)
from phasequant.report.sides import FIRST, TOKENS, phase_label, planned_side, sides

BANDS = 6  # phases that are drawn; the table has all
AFTER = "after block"


def build(report: Json) -> dict[str, Json]:
    """Every chart of the page by its id; those whose numbers were not measured are left out."""
    makers = (norm, absmax, update, jump, snr, spikes)
    made = {maker.__name__: maker(report) for maker in makers}
    return {**made, **maps.build(report)}


def norm(report: Json) -> Json:
    """Mean norm of the residual by depth."""
    raw = report["observations"]["raw"]
    curves = raw["residual"]["norm"]
    series = {"all tokens": curves["all_tokens"], "without the first token": curves["without_first"]}
    lines = [line(name, row, style, AFTER, start=-1) for style, (name, row) in enumerate(series.items())]
    y = log_axis(series.values(), "mean ‖h‖")
    return figure(depth_axis(raw["blocks"]), [panel(y, [*_bands(raw["phases"]), *lines], 240)])


def absmax(report: Json) -> Json:
    """Largest magnitude of the residual by depth, above one lane for each of the strongest phases."""
    raw, found = report["observations"]["raw"], sides(report)
    blocks, phases = raw["blocks"], raw["phases"][:BANDS]
    lines = _by_side(report, [side["residual"]["absmax"] for side in found], AFTER, start=-1)
    for mark, side in zip(lines, found, strict=True):
        mark["notes"] = [f"channel {channel}" for channel in side["residual"]["absmax_channel"]]
    y = log_axis([mark["y"] for mark in lines], "max |h|")
    panels = [panel(y, [*_bands(phases), *lines], 240)]
    if phases:
        lanes = [_lane(phase, row, blocks) for row, phase in enumerate(phases)]
        panels.append(panel({"range": [len(phases) - 0.5, -0.5], "ticks": []}, lanes, 24 * len(phases)))
    return figure(depth_axis(blocks), panels)


def update(report: Json) -> Json:
    """Largest magnitude that each block adds."""
    series = [side["residual"]["update_absmax"] for side in sides(report)]
    return _blocks(report, [panel(log_axis(series, "max |update|"), _by_side(report, series), 230)])


def jump(report: Json) -> Json:
    """Jump Ratio by block: raw, and behind the prefix if there is one; rotations do not change it."""
    raw = [side for side in sides(report) if side is not report["observations"]["transformed"]]
    limit, marks = report["thresholds"]["jr"], [rule("threshold", report["thresholds"]["jr"])]
    for first, key in FIRST.items():
        when = {"when": {"first": first}, "of": TOKENS[first]}
        series = [side["jump_ratio"][key] for side in raw]
        marks += [line(side["coordinates"], row, style, "block", **when)
                  for style, (side, row) in enumerate(zip(raw, series, strict=True))]  # fmt: skip
        marks += _raised(report, series[-1], when)
    values = [curve for side in raw for curve in side["jump_ratio"].values()]
    return _blocks(report, [panel(log_axis([*values, [limit]], "‖Δx‖ / ‖x‖"), marks, 240)])


def snr(report: Json) -> Json:
    """Historical Feature SNR by block, before and after the transform."""
    found, limit, marks = sides(report), report["thresholds"]["snr"], []
    where = planned_side(report)["coordinates"]
    marks.append(rule(f"threshold, {where}", limit, when={"bits": "4"}))
    values: dict[str, list[Sequence[float]]] = {width: [[limit]] if width == "4" else [] for width in found[0]["snr"]}
    for width, (first, key) in product(found[0]["snr"], FIRST.items()):
        series = [side["snr"][width][key] for side in found]
        when = {"when": {"bits": width, "first": first}, "of": f"{width} bits, {TOKENS[first]}"}
        marks += [*_by_side(report, series, "block", **when), *_raised(report, series[-1], when)]
        values[width] += series
    by = {width: linear_axis(curves, "SNR, dB") for width, curves in values.items()}
    return _blocks(report, [panel(by["4"], marks, 260, key="bits", by=by)])


def spikes(report: Json) -> Json:
    """QFeM's ratio of the largest token to the median one, a line a group; its threshold, where it left groups out."""
    marks, values = [], []
    for index, side in enumerate(sides(report)):
        for style, group in enumerate(dict.fromkeys(g["group"] for g in side["groups"])):
            values.append([g["spike_ratio"] for g in side["groups"] if g["group"] == group])
            when = {"when": {"side": str(index)}, "of": side["coordinates"]}
            marks.append(line(group, values[-1], style, "block", **when))
    alpha = report["plan"].get("alpha")
    if alpha is not None:
        values.append([alpha])
        marks.append(rule("alpha", alpha))
    return _blocks(report, [panel(log_axis(values, "largest / median token"), marks, 240)])


def _blocks(report: Json, panels: Sequence[Json]) -> Json:
    return figure(block_axis(report["model"]["blocks"]), panels)


def _by_side(report: Json, series: Sequence[Sequence[float]], note: str = "block", **more: Any) -> list[Json]:
    """A line for each side."""
    names = [side["coordinates"] for side in sides(report)]
    pairs = zip(names, series, strict=True)
    return [line(name, row, style, note, **more) for style, (name, row) in enumerate(pairs)]


def _bands(phases: Sequence[Json]) -> list[Json]:
    spans = {(p["appears"] - 0.5, p["last"] + 0.5): p["massive"] for p in reversed(phases[:BANDS])}
    return [{"kind": "band", "from": a, "to": b, "massive": massive} for (a, b), massive in spans.items()]


def _lane(phase: Json, row: int, blocks: int) -> Json:
    note = f"peak {phase['peak']:.5g}, {phase['times']:,.0f} × the median"
    return {"kind": "lane", "from": phase["appears"] - 0.5, "to": phase["last"] + 0.5, "row": row,
            "massive": phase["massive"], "text": phase_label(phase), "note": note,
            "late": phase["appears"] > 0.45 * blocks}  # fmt: skip


def _raised(report: Json, series: Sequence[float], more: Json) -> list[Json]:
    """Diamonds on the blocks that the chosen plan raises."""
    blocks = sorted({int(place.split(".")[0]) for place in report["plan"]["raised"]})
    values = [series[block] for block in blocks]
    return [{"kind": "dots", "name": "raised by the plan", "x": blocks, "y": values, "style": 2, "ring": True,
             "symbol": 1, **more}] if blocks else []  # fmt: skip
