"""The page's maps, and the error budget: GSR, spikes, tokens, noise and bits, group by block or token by depth."""

import math
from itertools import product

from phasequant.report.budget import error_budget
from phasequant.report.figures import (
    Json,
    block_axis,
    cells,
    figure,
    group_map,
    linear_colors,
    log_colors,
    panel,
    plain,
)
from phasequant.report.sides import FLOOR, bits, sides

GSR_KINDS = {
    "mean": ("gsr", "inputs, mean"),
    "p99": ("gsr_p99", "inputs, 99th percentile"),
    "weight": ("gsr_weight", "weights"),
}
TALL = 24  # pixels a row of a map of groups


def build(report: Json) -> dict[str, Json]:
    """Every map by its id."""
    makers = {"gsr": gsr, "spiking": spiking, "tokens": tokens, "noise": noise, "budget": error_budget, "plan": plan}
    made = {name: maker(report) for name, maker in makers.items()}
    return {name: one for name, one in made.items() if one is not None}


def bit_levels(report: Json) -> list[int]:
    """The bits that occur in any plan, in the order of the page's colours of bits."""
    return sorted({bits(spec) for each in report["plans"].values() for spec in (each["low"], *each["raised"].values())})


def gsr(report: Json) -> Json:
    """Grid-to-std ratio, block by group, before and after the transform on one scale."""
    panels, values = [], [[FLOOR]]
    for side in sides(report):
        marks = []
        for kind, (key, name) in GSR_KINDS.items():
            found = [g[key] for g in side["groups"]]
            values.append(found)
            marks.append(group_map(side, found, unit=" GSR", when={"gsr": kind}, of=name))
        panels.append(_groups(marks, side["coordinates"]))
    return _over_blocks(report, panels, log_colors(values, "GSR"))


def spiking(report: Json) -> Json | None:
    """Which token dominates which group's input, log colour; a map for each side. None in reports of older versions."""
    marks, values, listed, found = [], [], [], sides(report)
    if not all(side.get("spikes") for side in found):
        return None
    raised = report["plan"]["raised"]
    for index, side in enumerate(found):
        spikes = side["spikes"]
        columns = [_at(text, place) for text, place in zip(spikes["tokens"], spikes["places"], strict=True)]
        rows = spikes["rows"]
        values += [row["times"] for row in rows]
        marks.append(
            cells(
                [f"{row['block']} {row['group']}" for row in rows],
                columns,
                [row["times"] for row in rows],
                called="input of block",
                x=[[i, _short(text)] for i, text in enumerate(spikes["tokens"])],
                unit=" × the median",
                when={"side": str(index)},
                rownotes=[f"largest in channel {row['channel']}" for row in rows],
                tags=[
                    [row["group"], *(["raised"] if f"{row['block']}.{row['group']}" in raised else [])] for row in rows
                ],
            )
        )
        listed += [_strongest(side["coordinates"], row, columns) for row in rows]
    x = {"title": "token", "range": [-0.5, len(marks[0]["columns"]) - 0.5], "ticks": [], "slant": True}
    head = ["coordinates", "block", "group", "channel", "strongest token", "second", "third"]
    part = panel({"title": "input of block, group"}, marks, 0, row=9)
    return figure(x, [part], colors=log_colors(values, "largest value / median token’s"),
                  table={"head": head, "rows": listed})  # fmt: skip


def _at(text: str, place: list[int]) -> str:
    return f"{text!r} at {place[0]}:{place[1]}"


def _strongest(coordinates: str, row: Json, columns: list[str]) -> list[str]:
    best = sorted(zip(row["times"], columns, strict=True), reverse=True)[:3]
    told = [f"{name}: {plain(times)} ×" for times, name in best]
    return [coordinates, str(row["block"]), row["group"], str(row["channel"]), *told, *[""] * (3 - len(told))]


def _short(text: str) -> str:
    """A token for an axis."""
    return shown if len(shown := repr(text)) < 15 else shown[:12] + "…" + shown[-1]


def tokens(report: Json) -> Json:
    """Largest magnitude by depth and token, log colour."""
    found = report["observations"]["raw"]["token_map"]
    columns = [_at(text, place) for text, place in zip(found["tokens"], found["places"], strict=True)]
    depths = ["embedding", *(f"block {b}" for b in range(len(found["absmax"]) - 1))]
    mark = cells(depths, columns, found["absmax"], called="after", ticks=["emb", *map(str, range(len(depths) - 1))])
    x = {"title": "token", "range": [-0.5, len(columns) - 0.5], "slant": True,
         "ticks": [[i, _short(text)] for i, text in enumerate(found["tokens"])]}  # fmt: skip
    rows = []
    for index, name in enumerate(columns):
        column = [row[index] for row in found["absmax"]]
        rows.append([name, plain(column[0]), plain(max(column)), depths[column.index(max(column))], plain(column[-1])])
    table = {"head": ["token", "embedding", "largest", "after", "at the end"], "rows": rows}
    part = panel({"title": "after block"}, [mark], 0, row=14)
    return figure(x, [part], colors=log_colors(found["absmax"], "largest |h| of the token"), table=table)


def noise(report: Json) -> Json | None:
    """Noise that each group's low-bit input adds to the residual, dB; None where it was not measured."""
    side, raised = report["observations"]["transformed"], report["plan"]["raised"]
    if not all("low" in g["noise"] for g in side["groups"]):
        return None
    levels = [10 * math.log10(max(g["noise"]["low"], 1e-12)) for g in side["groups"]]
    mark = group_map(side, levels, unit=" dB")
    mark["texts"] = [
        [str(raised.get(f"{b}.{group}", {}).get("bits", "")) for b in range(side["blocks"])] for group in mark["rows"]
    ]
    return _over_blocks(report, [_groups([mark])], linear_colors([levels], "noise / residual, dB"))


def plan(report: Json) -> Json:
    """Bits of every group's input, a map for each plan."""
    side, levels, marks, rows = report["observations"]["raw"], bit_levels(report), [], []
    for name, entry in report["plans"].items():
        low = bits(entry["low"])
        mark = group_map(side, [None] * len(side["groups"]), when={"policy": name}, levels=levels, unit=" bits")
        mark["texts"] = [[""] * side["blocks"] for _ in mark["rows"]]
        mark["notes"] = [["the grid of all groups"] * side["blocks"] for _ in mark["rows"]]
        mark["values"] = [[low] * side["blocks"] for _ in mark["rows"]]
        for (row, group), block in product(enumerate(mark["rows"]), range(side["blocks"])):
            if found := entry["raised"].get(f"{block}.{group}"):
                mark["values"][row][block], mark["notes"][row][block] = found["bits"], found["why"]
                mark["texts"][row][block] = str(found["bits"])
        marks.append(mark)
        rows += [[name, group, *map(str, mark["values"][row])] for row, group in enumerate(mark["rows"])]
    head = ["plan", "group", *(str(block) for block in range(side["blocks"]))]
    made = _over_blocks(report, [_groups(marks)], None)
    return {**made, "table": {"head": head, "rows": rows}}


def _groups(marks: list[Json], title: str = "") -> Json:
    return panel({"title": ""}, marks, 0, row=TALL, title=title)


def _over_blocks(report: Json, panels: list[Json], colors: Json | None) -> Json:
    return figure(block_axis(report["model"]["blocks"]), panels, colors=colors)
