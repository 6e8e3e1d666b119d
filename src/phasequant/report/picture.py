"""The picture of a block: what is folded into which weight, what runs online before which linear, and in which bits.

Drawn from the run: the places of its transform, its plan, its low-rank branches and prefix. A list of steps in the
order of computation, which the page sets as boxes with arrows between them.
"""

from phasequant.ranges import ranges
from phasequant.report.rows import share_of
from phasequant.report.sides import Json, bits

READS = {"qkv": "T qkv", "o": "M", "gate_up": "T gate_up", "down": "R4"}  # what runs before a group's linears
FOLDED = {  # the name of a folded map → the linears that hold it, and on which side
    "gains": {"qkv": "gains of the norm", "gate_up": "gains of the norm", "head": "gains of the norm"},
    "R1": {"embed": "R1", "qkv": "R1⁻¹", "o": "R1", "gate_up": "R1⁻¹", "down": "R1", "head": "R1⁻¹"},
    "R2": {"qkv": "R2 (of v)", "o": "R2⁻¹"},
}
NAMES = {"qkv": ["q", "k", "v"], "o": ["o"], "gate_up": ["gate", "up"], "down": ["down"]}


def picture(report: Json) -> list[Json]:
    """Parts of the picture: a title and its steps."""
    told = report.get("runs") or {}
    norms = told.get("norms", ["input"])
    before = [_op("norm", "of the residual stream")] if "input" in norms else []
    shared = [_op("norm", "the one that attention reads, too")] if told.get("parallel", False) else before
    end = [*([_op("norm", "of the output")] if "output" in norms else []), _op("+", "onto the stream")]
    attention = [
        *before, *_online(report, "qkv"), _linear(report, "qkv"), *_named(report, "R3"), _cache(report),
        _op("attention", ""), *_online(report, "o"), _linear(report, "o"), *end,
    ]  # fmt: skip
    mlp = [
        *shared, *_online(report, "gate_up"), _linear(report, "gate_up"),
        _op("act(gate) · up" if told.get("gated", True) else "activation", ""),
        *_online(report, "down"), _linear(report, "down"), *end,
    ]  # fmt: skip
    ends = [_dense(report, "embed", "embedding"), _op(f"{report['model']['blocks']} blocks", "as above"),
            _op("norm", ""), _dense(report, "head", "head")]  # fmt: skip
    return [
        {"title": "Attention of every block", "steps": attention},
        {"title": "MLP of every block", "steps": mlp},
        {"title": "Around the blocks", "steps": ends},
    ]


def online_share(report: Json) -> str:
    """Multiply-adds of all online maps against those of the linears."""
    return share_of(sum(entry["macs"] for entry in report["transform"]), report["model"])


def _op(name: str, note: str) -> Json:
    return {"kind": "op", "name": name, "lines": [note] if note else [], "folded": []}


def _entry(report: Json, name: str) -> Json | None:
    return next((entry for entry in report["transform"] if entry["name"] == name), None)


def _named(report: Json, name: str) -> list[Json]:
    entry = _entry(report, name)
    if entry is None or entry["where"] != "online":
        return []
    share = share_of(entry["macs"], report["model"])
    lines = [entry["place"], entry["matrix"], f"{entry['macs']:,} multiply-adds a token ({share})"]
    return [{"kind": "online", "name": name, "lines": lines, "folded": []}]


def _online(report: Json, group: str) -> list[Json]:
    return _named(report, READS[group])


def _folded(report: Json, place: str) -> list[str]:
    names = [FOLDED[e["name"]][place] for e in report["transform"]
             if e["where"] == "folded" and place in FOLDED.get(e["name"], {})]  # fmt: skip
    scaled = {"qkv": ["qkv"], "o": ["o"], "gate_up": ["gate_up"], "down": ["down"]}.get(place, [])
    names += [f"{group} scales" for group in scaled if _entry(report, f"{group} scales")]
    if place == "gate_up" and _entry(report, "down scales"):
        names.append("down scales⁻¹ (of up)")
    if place == "qkv" and _entry(report, "o scales"):
        names.append("o scales⁻¹ (of v)")
    if place in READS and (entry := _entry(report, READS[place])) and entry["where"] == "online":
        names.append(f"{READS[place]}⁻¹")
    return names


def _linear(report: Json, group: str) -> Json:
    plan = report["plan"]
    told = [e for e in (report.get("runs") or {}).get("linears", []) if e["group"] == group]
    names = told[0]["names"] if told else NAMES[group]
    lines = [
        "inputs " + _levels(plan["low"], plan["raised"], group),
        "weights " + _levels(plan["weights"], plan.get("weights_raised", {}), group),
    ]
    lowrank = report["recipe"].get("lowrank", {})
    if lowrank.get("method", "none") != "none":
        rank = {**dict.fromkeys(READS, lowrank["rank"]), **dict(lowrank.get("ranks") or {})}[group]
        lines += [f"beside it, a branch of rank {rank} in 16 bits"] if rank else []
    return {"kind": "linear", "name": ", ".join(names), "lines": lines, "folded": _folded(report, group)}


def _levels(base: Json | None, raised: Json, group: str) -> str:
    """As in: 4 bits; 8 in blocks 0, 3-5."""
    own: dict[int, list[int]] = {}
    for place, entry in raised.items():
        block, name = place.split(".", 1)
        if name == group:
            own.setdefault(entry["bits"], []).append(int(block))
    return "; ".join([f"{bits(base)} bits", *(f"{b} in blocks {ranges(found)}" for b, found in sorted(own.items()))])


def _cache(report: Json) -> Json:
    plan, prefix = report["plan"], report.get("prefix")
    own: dict[int, list[int]] = {}
    for block, entry in plan.get("kv_raised", {}).items():
        own.setdefault(entry["bits"], []).append(int(block))
    more = [f"{b} in blocks {ranges(found)}" for b, found in sorted(own.items())]
    lines = ["; ".join([f"{bits(plan['kv'])} bits", *more])]
    if prefix:
        lines.append(f"{len(prefix['tokens'])} tokens before every sequence in 16 bits")
    return {"kind": "cache", "name": "KV cache", "lines": lines, "folded": []}


def _dense(report: Json, place: str, name: str) -> Json:
    return {"kind": "linear", "name": name, "lines": ["16 bits"], "folded": _folded(report, place)}
