"""A report's observations: which there are, and which the plan is of."""

import math
from statistics import NormalDist, fmean
from typing import Any

Json = dict[str, Any]
FLOOR = 0.247  # GSR of a uniform row
FIRST = {"without": "without_first", "with": "all_tokens"}
TOKENS = {"without": "all but first tokens", "with": "all tokens"}


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


def mean_gsr(side: Json) -> float:
    """GSR over all linear inputs."""
    return fmean(entry["gsr"] for entry in side["groups"])


def gaussian_gsr(width: int) -> float:
    """The 4-bit GSR of a Gaussian row: the median of its largest magnitude, over 7."""
    return NormalDist().inv_cdf((1 + 0.5 ** (1 / width)) / 2) / 7


def before_after(report: Json) -> list[Json]:
    """A row for each side: mean and worst block of Jump Ratio and SNR without first tokens, and of GSR."""
    return [_averages(side) for side in sides(report)]


def _averages(side: Json) -> Json:
    def each(curve: Json) -> list[float]:
        return [value for value in curve["without_first"] if math.isfinite(value)] or [math.nan]

    jumps, four, eight = each(side["jump_ratio"]), each(side["snr"]["4"]), each(side["snr"]["8"])
    groups = side["groups"]
    return {
        "name": side["coordinates"],
        "jump": fmean(jumps), "jump_worst": max(jumps),
        "snr4": fmean(four), "snr4_worst": min(four),
        "snr8": fmean(eight), "snr8_worst": min(eight),
        "gsr": mean_gsr(side), "gsr_worst": max(g["gsr"] for g in groups),
        "gsr_weight": fmean(g["gsr_weight"] for g in groups),
        "absmax": max(side["residual"]["absmax"]),
        "spike": max(g["spike_ratio"] for g in groups),
    }  # fmt: skip
