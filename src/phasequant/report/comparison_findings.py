"""The findings of a comparison, a sentence each."""

from collections.abc import Sequence
from statistics import StatisticsError, correlation

from phasequant.report.comparison_rows import (
    UNIFORM,
    Json,
    all_low,
    change,
    difference,
    find,
    label,
    listed,
    number,
    paired,
    ppl,
    ranked,
)


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
