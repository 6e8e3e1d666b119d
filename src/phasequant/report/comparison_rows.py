"""The rows of a comparison: what each holds, which is best, and whether a difference is more than noise."""

import math
import re
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import Any

Json = dict[str, Any]
UNIFORM, FULL = "uniform", "W16A16"
SHORTEST = 0.1  # seconds that the cost chart can show
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, two-sided, 1 to 9 degrees of freedom
BLANK: Json = {
    **dict.fromkeys(("a8_share", "gsr", "gsr_raw", "seconds", "peak_bytes", "online_macs", "macs_total")),
    **dict.fromkeys(("weight_bytes", "kv_bytes_per_token", "error")),
    **{"method": "", "policy": UNIFORM, "bits": "", "weights": "", "figures": {}, "gsr_by_group": {}, "transform": []},
}


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


def verdict_of(found: Json | None) -> str:
    """better, worse, undecided; nothing of the baseline itself."""
    return "" if found is None else str(found["verdict"])


def find(rows: Iterable[Json], recipe: str, policy: str) -> Json | None:
    """The row of a recipe under a policy."""
    return next((row for row in rows if (row["recipe"], row["policy"]) == (recipe, policy)), None)


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
