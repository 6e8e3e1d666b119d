"""Bytes by model size, computed from shapes alone: no time, nothing measured. `tests/test_docs.py` holds them to what a
quantized model really stores.

    weights   a linear O × I: O·⌈I/2⌉ bytes of 4-bit codes and 4·O of scales; embedding, head and norms at 2 a number
    KV        a token, of every block and kv head, keys and values: ⌈H/2⌉ bytes of codes and 3 of scale and zero point
"""

from phasequant.arch import GROUPS, ModelMap
from phasequant.bench.shapes import SHAPES
from phasequant.transform import fixed_rotations


def dense_bytes(model_map: ModelMap) -> int:
    """Embedding, norms and an untied head, in 16 bits: what stays beside the codes (LLaMA's layout)."""
    shape = model_map.shape
    normed_qk = 2 * shape.d_head * bool(model_map.family.qk_norms)
    return 2 * (2 * shape.vocab * shape.d_model + shape.d_model + shape.blocks * (2 * shape.d_model + normed_qk))


def weight_bytes(model_map: ModelMap, bits: int = 4) -> int:
    """Bytes of a checkpoint without online maps: per-channel symmetric codes of 4, 8 or 16 bits."""
    total = dense_bytes(model_map)
    for group in GROUPS:
        width, out = model_map.width_in(group), model_map.width_out(group)
        codes = {4: out * (-(-width // 2)), 8: out * width, 16: 2 * out * width}[bits]
        total += model_map.shape.blocks * (codes + (4 * out if bits < 16 else 0))
    return total


def kv_bytes(model_map: ModelMap, bits: int = 4) -> int:
    """Bytes of the KV cache a token."""
    shape = model_map.shape
    head = {4: -(-shape.d_head // 2) + 3, 8: shape.d_head + 3, 16: 2 * shape.d_head}[bits]
    return 2 * shape.blocks * shape.kv_heads * head


def online_share(model_map: ModelMap, **where: object) -> float:
    """What QuaRot runs online, as a fraction of the linears' multiply-adds."""
    return fixed_rotations(model_map, 0, **where).online_macs(model_map) / model_map.macs_total  # type: ignore[arg-type]


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [" | ".join(columns), " | ".join(["---"] + ["---:"] * (len(columns) - 1)), *(" | ".join(r) for r in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def tables() -> dict[str, str]:
    """Name → Markdown."""
    maps = {name: ModelMap.from_config(make()) for name, make in SHAPES.items()}
    gib = 2**30
    weights = [
        [name, f"{m.macs_total / 1e9:.2f} G", *(f"{weight_bytes(m, bits) / gib:.2f}" for bits in (16, 8, 4)),
         f"{dense_bytes(m) / gib:.2f}"]
        for name, m in maps.items()
    ]  # fmt: skip
    cache = [
        [name, *(f"{kv_bytes(m, bits):,}" for bits in (16, 8, 4)),
         *(f"{kv_bytes(m, bits) * 2**15 / gib:.2f}" for bits in (16, 4))]
        for name, m in maps.items()
    ]  # fmt: skip
    shares = [
        [name, *(f"{100 * m.shape.blocks * m.macs(group) / m.macs_total:.1f} %" for group in GROUPS),
         f"{400 / m.shape.blocks:.1f} %"]
        for name, m in maps.items()
    ]  # fmt: skip
    online = [
        [name, *(f"{100 * online_share(m, **how):.1f} %" for how in ({}, {"heads": "apart"}, {"where": "online"}))]
        for name, m in maps.items()
    ]
    return {
        "weights": _table(["shape", "linears", "16-bit, GiB", "W8", "W4", "of it in 16 bits"], weights),
        "cache": _table(["shape", "KV16, bytes a token", "KV8", "KV4", "32,768 tokens, KV16, GiB", "KV4, GiB"], cache),
        "shares": _table(["shape", *GROUPS, "DynamicPTQ's four blocks"], shares),
        "online": _table(["shape", "quarot", "rotation.heads=apart", "rotation.where=online"], online),
    }
