"""The charts of compare.html: perplexity by recipe and plan; against GSR; against the seconds that learning took."""

import math
from collections.abc import Callable, Sequence

from phasequant.report.comparison_rows import FULL, SHORTEST, label, number, ppl
from phasequant.report.figures import Json, figure, linear_axis, log_axis, log_ticks, panel, plain, rule

Value = Callable[[Json], float | None]


def build(done: list[Json], levels: Sequence[str], original: float | None) -> dict[str, Json]:
    """The charts by id; one that would be empty is left out."""
    values = [value for row in done for level in levels if (value := ppl(row, level)) is not None]
    if not values:
        return {}
    ends = [end for row in done for level in levels for end in _span(row, level, bounded=3 * max(values)) or ()]
    known = [*values, *ends, original] if original else [*values, *ends]
    groups = list(dict.fromkeys(group for row in done for group in row["gsr_by_group"]))
    kinds: dict[str, Value] = {"mean": lambda row: row["gsr"]}
    for group in groups:
        kinds[group] = _of_group(group)
    read = [row for row in done if row["bits"] != FULL]  # nothing is learned or gridded there
    made = {
        "ppl": dots(done, levels, original, known),
        "gsr": scatter(read, levels, original, known, kinds, "GSR of the linears’ inputs (4 bits)", log=False),
        "cost": scatter(read, levels, original, known, {"": _seconds}, "seconds to learn the transform", log=True),
    }
    return {name: one for name, one in made.items() if one is not None}


def _of_group(group: str) -> Value:
    return lambda row: row["gsr_by_group"].get(group)


def _seconds(row: Json) -> float | None:
    return None if row["seconds"] is None else max(row["seconds"], SHORTEST)


def _span(row: Json, level: str, bounded: float) -> list[float] | None:
    """The 95 % interval of a row's perplexity, cut where it would leave the chart."""
    found = (row["figures"].get(level) or {}).get("interval")
    if not found or found.get("low") is None or not math.isfinite(found["low"]) or found["low"] <= 0:
        return None
    return [max(found["low"], 1.0), min(found["high"], bounded)]


def _log_axis(values: Sequence[float], title: str) -> Json:
    low, high = math.log10(min(values)), math.log10(max(values))
    room = 0.05 * ((high - low) or 0.5)
    span = [10 ** (low - room), 10 ** (high + room)]
    return {"title": title, "log": True, "range": span, "ticks": log_ticks(*span)}


def dots(done: list[Json], levels: Sequence[str], original: float | None, known: Sequence[float]) -> Json | None:
    """A line a recipe, a dot a plan with its interval."""
    names, policies = (list(dict.fromkeys(row[key] for row in done)) for key in ("recipe", "policy"))
    step, marks, listed = 0.5 / max(len(policies), 2), [], []
    limit = max(known)
    for level in levels:
        for index, policy in enumerate(policies):
            rows = [row for row in done if row["policy"] == policy and ppl(row, level) is not None]
            shift = (index - (len(policies) - 1) / 2) * step
            marks.append(_points(policy, index, level, rows, [ppl(row, level) for row in rows],
                                 [names.index(row["recipe"]) + shift for row in rows],
                                 [_span(row, level, limit) for row in rows]))  # fmt: skip
            listed += [[row["recipe"], policy, level, number(ppl(row, level), "ppl"), *_ends(row, level)]
                       for row in rows]  # fmt: skip
    marks = [mark for mark in marks if mark["x"]]
    if not marks:
        return None
    if original:
        marks.insert(0, rule("16-bit", original, "x", text=f"16-bit {number(original, 'ppl')}"))
    y = {"title": "", "range": [len(names) - 0.5, -0.5], "ticks": [[i, name] for i, name in enumerate(names)]}
    head = ["recipe", "plan", "KV bits", "perplexity", "95 % from", "to"]
    return figure(_log_axis(known, "perplexity"), [panel(y, marks, len(names) * max(30, 16 * len(policies)))],
                  table={"head": head, "rows": listed})  # fmt: skip


def _ends(row: Json, level: str) -> list[str]:
    found = (row["figures"].get(level) or {}).get("interval") or {}
    return [number(found.get(end), ".2f") for end in ("low", "high")]


def scatter(
    done: list[Json], levels: Sequence[str], original: float | None, known: Sequence[float], kinds: dict[str, Value],
    title: str, *, log: bool,
) -> Json | None:  # fmt: skip
    """Perplexity against one figure a row; `kinds`: that figure's variants."""
    policies = list(dict.fromkeys(row["policy"] for row in done))
    values = [value for of in kinds.values() for row in done if (value := of(row)) is not None]
    if not values:
        return None
    x = log_axis([values], title, 0.08) if log else linear_axis([values], title)
    unit, marks, listed = " s" if log else " GSR", [], []
    for level in levels:
        for kind, of in kinds.items():
            named: set[str] = set()
            for index, policy in enumerate(policies):
                rows = [r for r in done if r["policy"] == policy and of(r) is not None and ppl(r, level) is not None]
                mark = _points(policy, index, level, rows, [of(row) for row in rows], [ppl(row, level) for row in rows])
                mark["notes"] = [f"{_told(row, level)}\n{plain(of(row))}{unit}" for row in rows]
                mark["texts"] = ["" if row["recipe"] in named else row["recipe"] for row in rows]
                named |= {row["recipe"] for row in rows}
                mark["when"] = {"kv": level, **({"gsr": kind} if kind else {})}
                marks += [mark] if rows else []
                listed += [[row["recipe"], policy, level, kind or "seconds", plain(of(row)),
                            number(ppl(row, level), "ppl")] for row in rows]  # fmt: skip
    if not marks:
        return None
    marks.insert(0, rule("16-bit", original, text=f"16-bit {number(original, 'ppl')}") if original else {})
    head = ["recipe", "plan", "KV bits", "of", title, "perplexity"]
    return figure(x, [panel(_log_axis(known, "perplexity"), marks, 320)], table={"head": head, "rows": listed})


def _told(row: Json, level: str) -> str:
    return f"{label(row)}\nperplexity {number(ppl(row, level), 'ppl')} at KV{level}"


def _points(
    name: str, index: int, level: str, rows: Sequence[Json], xs: Sequence[float | None], ys: Sequence[float | None],
    spans: Sequence[list[float] | None] = (),
) -> Json:  # fmt: skip
    notes = [_told(row, level) for row in rows]
    if spans:
        notes = [f"{note}\n95 %: {' … '.join(_ends(row, level))}" if span else note
                 for note, row, span in zip(notes, rows, spans, strict=True)]  # fmt: skip
    return {"kind": "dots", "name": name, "x": list(xs), "y": list(ys), "style": (1, 0, 2, 3, 4, 5)[index % 6],
            "symbol": index % 6, "notes": notes, "spans": list(spans), "when": {"kv": level}}  # fmt: skip
