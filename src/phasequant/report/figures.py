"""What charts are made of: plain dicts that the page's script (`charts.js`) draws, and that become tables.

    figure   x: an axis; panels: one above the other over that axis; colors: the scale of cells, where there are any
    panel    title, height (pixels) or row (pixels a row of cells), y: an axis, marks: what is drawn, first below;
             by: another y axis for each value of the control `key`
    axis     title, range, ticks: [value, text] pairs, log
    mark     kind: line, dots, rule (dotted, across), band (shaded), lane (a bar with its name), bars, cells

A mark with `when` is drawn only while the page's controls hold those values, as in {"bits": "4"}; `of` says the same in
a table's head. `notes` are what hovering or the arrow keys show beside the numbers. Colours are classes of the page's
style sheet (`style`: 0, 1, …), so that a theme or a printer changes them without drawing anew.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

Json = dict[str, Any]


def figure(x: Json, panels: Sequence[Json], **more: Any) -> Json:
    """A chart."""
    return {"x": x, "panels": list(panels), **more}


def panel(y: Json, marks: Sequence[Json | None], height: int, **more: Any) -> Json:
    """A part of a chart with its own y axis."""
    return {"y": y, "marks": [mark for mark in marks if mark], "height": height, **more}


def line(name: str, values: Sequence[float], style: int, note: str = "", **more: Any) -> Json:
    """Values at 0, 1, …; or at `x`. `note`: what their places are called, as in `after block`."""
    x = more.pop("x", None) or range(more.pop("start", 0), len(values))
    return {"kind": "line", "name": name, "x": list(x)[: len(values)], "y": list(values), "style": style,
            "note": note, **more}  # fmt: skip


def rule(name: str, at: float, way: str = "y", **more: Any) -> Json:
    """A dotted line across the panel: at a value of `way`."""
    return {"kind": "rule", "name": name, "at": at, "way": way, **more}


def block_axis(blocks: int) -> Json:
    """Blocks from 0."""
    return {"title": "block", "range": [-0.6, blocks - 0.4], "ticks": [[b, str(b)] for b in range(blocks)]}


def depth_axis(blocks: int) -> Json:
    """What each block leaves; -1 is the embedding."""
    ticks = [[-1, "emb"], *([b, str(b)] for b in range(blocks))]
    return {"title": "after block (emb: the embedding)", "range": [-1.6, blocks - 0.4], "ticks": ticks}


def log_axis(series: Iterable[Iterable[float | None]], title: str, room: float = 0.06) -> Json:
    """A logarithmic axis around the positive values."""
    values = known(series, positive=True)
    low, high = math.log10(min(values)), math.log10(max(values))
    pad = room * ((high - low) or 0.5)
    span = [10 ** (low - pad), 10 ** (high + pad)]
    return {"title": title, "log": True, "range": span, "ticks": log_ticks(span[0], span[1])}


def linear_axis(series: Iterable[Iterable[float | None]], title: str, room: float = 0.06) -> Json:
    """A linear axis around the values."""
    values = known(series)
    pad = room * ((max(values) - min(values)) or abs(max(values)) or 1.0)
    span = [min(values) - pad, max(values) + pad]
    return {"title": title, "range": span, "ticks": linear_ticks(span[0], span[1])}


def known(series: Iterable[Iterable[float | None]], *, positive: bool = False) -> list[float]:
    """The finite values, or a stand-in."""
    found = [v for row in series for v in row if v is not None and math.isfinite(v) and (v > 0 or not positive)]
    return found or [1.0]


def linear_ticks(low: float, high: float, wish: int = 6) -> list[list[Any]]:
    """Round numbers inside."""
    rough = (high - low) / wish
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= rough * 0.999)
    values = [float(f"{i * step:.12g}") for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return [[value, text(value)] for value in values]


def log_ticks(low: float, high: float) -> list[list[Any]]:
    """Round numbers inside, the fewer the wider the span."""
    if high < 4 * low:
        return linear_ticks(low, high)
    start, end = math.floor(math.log10(low)), math.ceil(math.log10(high))
    wide = math.log10(high / low)
    steps = (1, 1.5, 2, 3, 5, 7) if wide < 1.3 else (1, 2, 5) if wide <= 3 else (1,)
    values = [step * 10.0**power for power in range(start, end + 1) for step in steps]
    return [[value, text(value)] for value in values if low <= value <= high]


def text(value: float) -> str:
    """A round number on an axis."""
    return f"{value:,.10g}".replace("-", "−") if abs(value) >= 1e-4 or value == 0 else f"{value:.2g}".replace("-", "−")


def log_colors(series: Iterable[Iterable[float | None]], title: str) -> Json:
    """A logarithmic colour scale over the positive values."""
    values = known(series, positive=True)
    low, high = min(values), max(values)
    if high <= low:
        high = low * 1.01
    return {"title": title, "log": True, "range": [low, high], "ticks": log_ticks(low, high)}


def linear_colors(series: Iterable[Iterable[float | None]], title: str) -> Json:
    """A linear colour scale."""
    values = known(series)
    low, high = min(values), max(values)
    if high <= low:
        high = low + 1.0
    return {"title": title, "range": [low, high], "ticks": linear_ticks(low, high, 5)}


def cells(rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[Any]], **more: Any) -> Json:
    """A map: a value for each row and column."""
    return {"kind": "cells", "rows": list(rows), "columns": list(columns), "values": [list(r) for r in values], **more}


def group_map(side: Json, values: Sequence[Any], **more: Any) -> Json:
    """A map, group by block, of a value for each entry of `groups`."""
    names = list(dict.fromkeys(entry["group"] for entry in side["groups"]))
    pairs = list(zip(side["groups"], values, strict=True))
    found = [[value for entry, value in pairs if entry["group"] == name] for name in names]
    return cells(names, [f"block {b}" for b in range(side["blocks"])], found, **more)


# --- tables -------------------------------------------------------------------------------------------------------


def table(made: Json) -> Json:
    """The numbers behind a chart: {"head": […], "rows": [[…]]}; a chart may bring its own as `table`."""
    if "table" in made:
        return dict(made["table"])
    marks = [(part, mark) for part in made["panels"] for mark in part["marks"]]
    columns: dict[str, dict[Any, Any]] = {}
    for part, mark in marks:
        if mark["kind"] in ("line", "bars"):
            head = ", ".join(filter(None, (mark["name"], mark.get("of"))))
            columns.setdefault(head, {}).update(zip(mark["x"], mark["y"], strict=True))
        elif mark["kind"] == "cells":
            for row, values in zip(mark["rows"], mark["values"], strict=True):
                head = ", ".join(filter(None, (row, part.get("title"), mark.get("of"))))
                columns.setdefault(head, {}).update(enumerate(values))
    names = dict(made["x"]["ticks"])
    places = sorted({place for by in columns.values() for place in by})
    rows = [[names.get(p, p), *(plain(by.get(p)) for by in columns.values())] for p in places]
    return {"head": [made["x"]["title"].split(" (")[0], *columns], "rows": rows}


def plain(value: Any) -> str:
    """A number of a table."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, (int, str)):
        return str(value)
    return f"{value:,.4g}".replace("-", "−") if not 1e4 <= abs(value) < 1e15 else f"{value:,.0f}".replace("-", "−")
