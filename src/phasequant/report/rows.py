"""Parts of a report as the text of table cells."""

import json
from collections.abc import Iterable, Mapping
from statistics import fmean

from phasequant.ranges import ranges
from phasequant.report.sides import Json, bits, phase_label

RUNGS = {
    "hadamard": "",
    "diagonal": "",
    "learned": "",
    "wush": "",
    "kronecker": "",
    "block-hadamard": "no Hadamard matrix of the whole width: it mixes within blocks only",
    "random-orthogonal": "no Hadamard matrix of this width: a dense random rotation, costlier and less even",
    "identity": "width 1: nothing to rotate",
}


def plan_rows(plan: Json) -> Json:
    """A plan's size and its raised groups."""
    rows = [(*place.split(".", 1), entry["bits"], entry["why"]) for place, entry in plan["raised"].items()]
    for place, entry in plan.get("weights_raised", {}).items():
        block, group = place.split(".", 1)
        rows.append((block, f"weights of {group}", entry["bits"], entry["why"]))
    rows += [(block, "KV", entry["bits"], entry["why"]) for block, entry in plan.get("kv_raised", {}).items()]
    return {"policy": plan["policy"], "low": bits(plan["low"]), "a8": f"{100 * plan['a8_share']:.1f}", "rows": rows}


def some_blocks(blocks: list[int]) -> str:
    """As in: blocks 28-29."""
    return f"{'block' if len(blocks) == 1 else 'blocks'} {ranges(blocks)}" if blocks else "no block"


def phase_row(phase: Json) -> Json:
    """One phase, as text."""
    return {
        "kind": "massive" if phase["massive"] else "large",
        "label": phase_label(phase),
        "peak": f"{phase['peak']:,.0f}",
        "times": f"{phase['times']:,.0f}",
        "written": some_blocks(phase["written_by"]) if phase["appears"] >= 0 else "the embedding",
        "taken_back": some_blocks(phase["taken_back_by"]),
        "span": f"{max(phase['appears'], 0)}–{phase['last']}",
        "tokens": [(repr(text), count) for text, count in phase["tokens"]],
    }


def linear_macs(model: Json) -> int:
    """Multiply-adds a token of all linears inside the blocks; reports of older versions are of gated MLPs."""
    if "macs_total" in model:
        return int(model["macs_total"])
    heads, width = model["heads"] * model["d_head"], model["d_model"]
    keys = 2 * model["kv_heads"] * model["d_head"]
    return model["blocks"] * width * (2 * heads + keys + 3 * model["d_ffn"])


def learning_row(cost: Json | None) -> Json | None:
    """What learning the transform took; None where nothing is known of it."""
    if not cost:
        return None
    return {
        "seconds": f"{cost['seconds']:.1f}",
        "a_block": f"{cost['seconds_per_block']:.2f}",
        "peak": f"{cost['peak_bytes'] / 2**30:.2f}",
        "blocks": [
            {
                "block": index,
                "before": f"{one['loss_before']:.3g}",
                "after": f"{one['loss_after']:.3g}",
                "share": f"{100 * one['loss_after'] / one['loss_before']:.0f} %" if one["loss_before"] else "–",
                "seconds": f"{one['seconds']:.1f}",
                "peak": f"{one['peak_bytes'] / 2**30:.2f}",
            }
            for index, one in enumerate(cost["blocks"])
        ],
    }


def weights_row(weights: Json | None) -> Json | None:
    """How the codes of the weights came about; None where nothing is known of it."""
    if not weights:
        return None
    groups = weights["groups"]
    rows = []
    for name in dict.fromkeys(entry["group"] for entry in groups):
        own = [entry for entry in groups if entry["group"] == name]
        errors = [entry["error"] for entry in own if entry["error"] is not None]
        ranks = {int(entry["notes"].get("rank", 0)) for entry in own}
        rows.append(
            {
                "group": name,
                "error": f"{100 * fmean(errors):.3f} %" if errors else "–",
                "worst": f"{100 * max(errors):.3f} %" if errors else "–",
                "rank": ", ".join(str(rank) for rank in sorted(ranks) if rank) or "–",
                "dead": sum(entry["dead"] for entry in own) or "–",
            }
        )
    return {
        "method": weights["method"] + ("" if weights["lowrank"] == "none" else f" + {weights['lowrank']}"),
        "branch": f"{weights['branch_macs']:,}" if weights["branch_macs"] else "",
        "seconds": f"{weights['seconds']:.1f}",
        "peak": f"{weights['peak_bytes'] / 2**30:.2f}",
        "rows": rows,
        "known": any(row[key] != "–" for row in rows for key in ("error", "rank", "dead")),
        "fallen": [entry for entry in groups if entry["why"] is not None],
    }


def share_of(macs: int, model: Json) -> str:
    """Multiply-adds a token against those of all linears inside the blocks."""
    return f"{100 * macs / linear_macs(model):.2f} %" if macs else "–"


def transform_row(entry: Json, model: Json) -> Json:
    """One place of the transform, with its cost and a word on its rung."""
    warning = RUNGS.get(entry["rung"], f"not a Hadamard matrix: {entry['rung']}")
    return {**entry, "share": share_of(entry["macs"], model), "warning": warning}


def grid_text(spec: Json | None) -> str:
    """A grid in few words."""
    if spec is None:
        return "16 bits"
    size = f"group of {spec['group_size']}" if spec.get("group_size") else spec.get("granularity", "")
    kind = f"int{spec['bits']}" if spec.get("kind", "int") == "int" else spec["kind"]
    return f"{kind}, one scale a {size}" if size else kind


def run_rows(runs: Json | None) -> list[Json]:
    """Kernels and bytes as text; none where nothing is known of them."""
    if not runs:
        return []
    return [
        {
            "group": entry["group"], "names": ", ".join(entry["names"]), "blocks": ranges(entry["blocks"]),
            "first": entry["blocks"][0], "count": len(entry["blocks"]), "size": f"{entry['in']:,} → {entry['out']:,}",
            "weights": grid_text(entry["weights"]), "inputs": grid_text(entry["inputs"]),
            "kernel": entry["kernel"], "why": entry["why"], "raw": entry["bytes"],
            "bytes": f"{entry['bytes'] / 2**20:,.2f}", "bytes_16": f"{entry['bytes_16'] / 2**20:,.2f}",
        }
        for entry in runs["linears"]
    ]  # fmt: skip


def flat(values: Json, prefix: str = "") -> Iterable[tuple[str, str]]:
    """Every key of the recipe with its dots, and its value."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(dict(value), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value, ensure_ascii=False)
