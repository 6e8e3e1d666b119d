"""The error budget: what each group's rounding costs the model at the low grid, and what of it a plan leaves.

Costs are those that the plan was made by (`sensitivity`: for `gradient`, nats a token to first order, of which some are
below zero). Reports without them fall back on the measured noise in the residual stream, which is a share of the
stream's power; rounding noise falls by 4 a bit there.
"""

from collections.abc import Mapping

from phasequant.report.figures import Json, block_axis, figure, linear_ticks, panel, plain
from phasequant.report.sides import bits

UNITS = {
    "noise": "noise / residual power",
    "kl": "KL, nats a token",
    "kl_alone": "KL, nats a token",
    "fisher": "nats a token, Fisher form",
    "gradient": "nats a token, first order",
    "local": "error of the block’s output",
}
Harm = dict[str, dict[int, float]]


def harm_of(report: Json) -> tuple[str, Harm] | None:
    """The measure's name, and place → bits → harm; None where nothing was measured."""
    told = report.get("sensitivity")
    if told:
        return told["name"], {p: {int(b): h for b, h in by.items()} for p, by in told["harm"].items()}
    groups = report["observations"]["transformed"]["groups"]
    if not all("low" in g["noise"] for g in groups):
        return None
    low = bits(report["plan"]["low"])
    wide = {b: 4.0 ** (low - b) for b in (low, 8)} | {16: 0.0}
    return "noise", {
        f"{g['block']}.{g['group']}": {b: g["noise"]["low"] * part for b, part in wide.items()} for g in groups
    }


def bits_at(plan: Json, place: str) -> int:
    """What a plan lets a place read: a group's input, the weights of a group, or a block's keys and values."""
    block, name = place.split(".", 1)
    if name == "kv":
        return bits(plan.get("kv_raised", {}).get(block, plan["kv"]))
    if name.startswith("weights:"):
        return bits(plan.get("weights_raised", {}).get(f"{block}.{name.removeprefix('weights:')}", plan["weights"]))
    return bits(plan["raised"].get(place, plan["low"]))


def left(harm: Harm, plan: Json) -> dict[str, float] | None:
    """Place → what is left under a plan; None where a place reads bits that were not measured."""
    found = {place: {16: 0.0, **by}.get(bits_at(plan, place)) for place, by in harm.items()}
    return None if any(value is None for value in found.values()) else {p: v for p, v in found.items() if v is not None}


def lowest(harm: Harm) -> dict[str, float]:
    """Place → harm at the fewest bits."""
    return {place: by[min(by)] for place, by in harm.items()}


def _name(place: str) -> str:
    name = place.split(".", 1)[1]
    return f"weights of {name.removeprefix('weights:')}" if name.startswith("weights:") else name


def rows(report: Json) -> dict[str, list[Json]]:
    """Plan → a row a group, and their sum: harm with everything low, its share, and what the plan leaves."""
    measured = harm_of(report)
    if measured is None:
        return {}
    harm = measured[1]
    start, found = lowest(harm), {}
    for policy, plan in report["plans"].items():
        rest = left(harm, plan)
        if rest is None:
            continue
        names = list(dict.fromkeys(map(_name, harm)))
        sums = [(n, [sum(v for p, v in of.items() if _name(p) == n) for of in (start, rest)]) for n in names]
        total = sum(start.values())
        found[policy] = [_row(name, a, b, total) for name, (a, b) in [*sums, ("all", [total, sum(rest.values())])]]
    return found


def _row(name: str, before: float, after: float, total: float) -> Json:
    share = f"{100 * before / total:.1f}".replace("-", "−") if total > 0 else "–"
    less = f"{100 * (after - before) / before:+.1f} %".replace("-", "−") if before > 0 else "–"
    return {"name": name, "before": plain(before), "share": share, "after": plain(after), "less": less,
            "values": [before, after]}  # fmt: skip


def error_budget(report: Json) -> Json | None:
    """Stacked by block: what a plan leaves of each group's harm, and pale, what it takes away; None without harm."""
    measured = harm_of(report)
    if measured is None:
        return None
    name, harm = measured
    start, blocks, marks, top = lowest(harm), report["model"]["blocks"], [], 0.0
    names = list(dict.fromkeys(map(_name, harm)))

    def by_block(values: Mapping[str, float], group: str) -> list[float]:
        found = [0.0] * blocks
        for place, value in values.items():
            if _name(place) == group:
                found[int(place.split(".")[0])] += max(value, 0.0)
        return found

    for policy, plan in report["plans"].items():
        rest = left(harm, plan)
        if rest is None:
            continue
        gone = {place: max(value, 0.0) - max(rest[place], 0.0) for place, value in start.items()}
        for pale, values in ((False, rest), (True, gone)):
            for style, group in enumerate(names):
                heights = by_block(values, group)
                if not pale or any(heights):
                    told = f"{group}, taken away" if pale else group
                    marks.append({"kind": "bars", "name": told, "x": list(range(blocks)), "y": heights, "style": style,
                                  "pale": pale, "when": {"policy": policy}, "of": policy})  # fmt: skip
        heights_of = [m["y"] for m in marks if m["of"] == policy]
        top = max([top, *map(sum, zip(*heights_of, strict=True))])
    if not marks:
        return None
    span = [0.0, 1.05 * top or 1.0]
    y = {"title": UNITS.get(name, name), "range": span, "ticks": linear_ticks(span[0], span[1])}
    return figure(block_axis(blocks), [panel(y, marks, 240)])
