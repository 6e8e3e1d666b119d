"""Keys and values of a PhaseQuant checkpoint: the grid it promises, and what each target does with it."""

import torch

from phasequant.arch import ModelMap
from phasequant.doctor.report import SIXTEEN, KVRow, Precision, Problem, Report, merged, short
from phasequant.kernels import Machine
from phasequant.kernels.gpu import rules, runs
from phasequant.nn import ModelLayout
from phasequant.nn.attention import SDPA, TRITON
from phasequant.numerics import QuantSpec

INT4 = "int4_per_token_head"
PLAIN = ("auto", "bfloat16", "float16")


def by_triton(spec: QuantSpec, d_head: int, dtype: torch.dtype, machine: Machine) -> tuple[bool, str]:
    """`KVQuantizer.by_triton` of a machine that need not be here."""
    ok, reason = runs(machine.kind, "triton" in machine.packages)
    if machine.kind != "cuda" or not ok:
        return False, reason if not ok else f"Triton is for cuda, not for {machine.kind}"
    old = rules.too_old(machine)
    return (False, old) if old else rules.kv_fits(spec, d_head, dtype)


def kv_rows(
    layout: ModelLayout, model_map: ModelMap, target: str, machine: Machine, dtype: torch.dtype, kv_cache: str,
    report: Report,
) -> list[KVRow]:  # fmt: skip
    """A row for blocks that hold alike; problems where vLLM's flag overrules the checkpoint."""
    rows = []
    for block in model_map.blocks:
        grids = layout.kv.get(block)
        promised = SIXTEEN if grids is None else short(grids.keys)
        if target == "vllm":
            rows.append(_in_vllm(block, promised, grids is not None, kv_cache))
            continue
        how = "Transformers' own cache and attention"
        if grids is not None:
            ok, reason = by_triton(grids.keys, model_map.shape.d_head, dtype, machine)
            how = f"packed; {SDPA} ({reason})"
            if ok:
                how = f"packed; {TRITON}, {SDPA} for more than one new token"
        elif layout.prefix is not None:
            how = "Transformers' own cache, behind the prefix"
        rows.append(KVRow((block,), Precision(promised, promised), how))
    found: list[KVRow] = merged(rows)
    if target == "vllm":
        _flag(report, found, kv_cache, machine)
        if layout.kv and kv_cache in PLAIN:
            report.notes.append(
                "KV in vLLM: the checkpoint's numbers in vLLM's 16-bit cache: exact, but no bytes are saved "
                f"(--kv-cache-dtype {INT4} saves them on CUDA, on vLLM's own grid)"
            )
    return found


def _in_vllm(block: int, promised: str, quantized: bool, kv_cache: str) -> KVRow:
    if kv_cache in PLAIN:
        how = "PhaseQuant's plugin rounds to the grid, vLLM keeps 16 bits" if quantized else "vLLM's 16-bit cache"
        return KVRow((block,), Precision(promised, promised), how)
    return KVRow((block,), Precision(promised, f"vLLM's {kv_cache}"), f"--kv-cache-dtype {kv_cache}")


def _flag(report: Report, rows: list[KVRow], kv_cache: str, machine: Machine) -> None:
    """The plugin takes vLLM's 4-bit grid in the place of the checkpoint's where it is asked for, on CUDA, and refuses
    every other."""
    if kv_cache in PLAIN or all(row.states.kept for row in rows):
        return
    if kv_cache == INT4 and machine.kind == "cuda":
        what, do = (
            f"{INT4} is a grid of vLLM's own, in the place of the checkpoint's",
            "measure what it costs, or leave",
        )
        report.problems.append(Problem("KV", what, f"{do} --kv-cache-dtype away"))
    else:
        what = f"the plugin refuses --kv-cache-dtype {kv_cache}: keys and values would be rounded a second time"
        report.problems.append(Problem("KV", what, "leave the flag away"))
