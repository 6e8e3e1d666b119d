"""A PhaseQuant checkpoint: which kernel each linear gets, and by which rule.

The model is laid out on the meta device as loading does it, every linear's `LinearSpec` is put to `kernels.choose_on`
(the rule of `can_run`), and what reads one input is taken as the target takes it: apart in Transformers, stacked in the
runtime and in vLLM. Kernels here compute the promised grid or are not chosen, so what can differ is: nothing runs, the
files are not those of the manifest, the scales are not what the chosen kernel holds, the target refuses.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from phasequant.arch import ModelMap
from phasequant.checkpoint import manifest
from phasequant.checkpoint.hf import PhaseQuantConfig
from phasequant.doctor import stored
from phasequant.doctor.native_kv import kv_rows
from phasequant.doctor.report import SIXTEEN, Precision, Problem, Report, Row, merged, place, short, together
from phasequant.errors import PhaseQuantError
from phasequant.kernels import LinearSpec, Machine, choose_on
from phasequant.nn import ModelLayout, lay_out, quant_linears
from phasequant.surroundings import hushed_transformers

LANES = "triton-int8", "humming-int8"
STACKED = ("runtime", "vllm")


def examine(
    folder: Path, target: str, machine: Machine, *, verify: bool, kv_cache: str, tensor_parallel: int
) -> Report:
    """The report on a checkpoint."""
    config = AutoConfig.from_pretrained(folder)
    given = config.quantization_config
    checked = PhaseQuantConfig(**given) if isinstance(given, dict) else given
    model_map = ModelMap.from_config(config)
    layout = ModelLayout.from_dict(checked.layout, model_map)
    report = Report(str(folder), "phasequant", target, machine.name, "PhaseQuant's own rules (kernels, runtime)")
    _verify(folder, report, verify)
    dtype = _dtype(checked.dtype, target, machine)
    specs = _linears(config, model_map, layout, dtype)
    if target in STACKED:
        specs = {at: [_stacked(found)] for at, found in specs.items()}
    report.rows = _rows(specs, layout, machine, report)
    report.kv = kv_rows(layout, model_map, target, machine, dtype, kv_cache, report)
    _target(report, config, layout, model_map, target, tensor_parallel)
    if any(problem.where in ("model", "vLLM") for problem in report.problems):  # refused: nothing runs
        report.rows = [
            replace(row, kernel="none: refused", weights=replace(row.weights, real="none"),
                    inputs=replace(row.inputs, real="none"))
            for row in report.rows
        ]  # fmt: skip
        report.kv = [replace(row, states=replace(row.states, real="none"), how="none: refused") for row in report.kv]
    _maps(folder, report, layout)
    if any("humming-int8" in row.kernel for row in report.rows):
        report.problems += stored.scales_in_16_bits(folder)
    if target in STACKED and layout.weights is not None and layout.weights.kind == "nvfp4":
        report.problems += stored.one_second_scale(folder, model_map)
    _lanes(report, machine)
    return report


def _verify(folder: Path, report: Report, verify: bool) -> None:
    if not verify:
        report.notes.append("the files were not compared with the manifest (--no-verify)")
    elif not (folder / manifest.NAME).is_file():
        report.notes.append("there is no manifest.json: the files cannot be compared with what was saved")
    else:
        try:
            manifest.check(folder)
        except PhaseQuantError as error:
            report.problems.append(Problem("files", str(error), "no answer below holds for damaged files"))


def _dtype(stored_type: str, target: str, machine: Machine) -> torch.dtype:
    """Of activations between layers: fp32 on a CPU, but for vLLM, which takes 16 bits."""
    if target == "vllm":
        return torch.bfloat16 if stored_type == "float32" else getattr(torch, stored_type)
    return torch.float32 if machine.kind == "cpu" else getattr(torch, stored_type)


def _linears(
    config: Any, model_map: ModelMap, layout: ModelLayout, dtype: torch.dtype
) -> dict[tuple[int, str], list[LinearSpec]]:
    plain = type(config).from_dict({k: v for k, v in config.to_dict().items() if k != "quantization_config"})
    with torch.device("meta"), hushed_transformers():
        model = AutoModelForCausalLM.from_config(plain, dtype=dtype)
    lay_out(model, model_map, layout, dtype)
    modules = dict(quant_linears(model))
    found: dict[tuple[int, str], list[LinearSpec]] = {}
    for block, group, name in model_map.linears():
        found.setdefault((block, group), []).append(replace(modules[name].spec, dtype=dtype))
    return found


def _stacked(specs: list[LinearSpec]) -> LinearSpec:
    return replace(specs[0], out_features=sum(s.out_features for s in specs), rank=sum(s.rank for s in specs))


def _rows(
    specs: dict[tuple[int, str], list[LinearSpec]], layout: ModelLayout, machine: Machine, report: Report
) -> list[Row]:
    made = []
    for (block, group), linears in specs.items():
        chosen: Counter[str] = Counter()
        why: dict[str, str] = {}
        for spec in linears:
            kernel, refused = choose_on(spec, machine)
            chosen[kernel.name if kernel is not None else ""] += 1
            why |= refused
        weights, inputs = (short(s) for s in (linears[0].weight, linears[0].input))
        runs = "" not in chosen
        kernel_names = " + ".join(f"{n} ({k})" if len(chosen) > 1 else k or "none" for k, n in chosen.most_common())
        online = layout.online.get(group)
        made.append(Row(
            (block,), group, kernel_names, Precision(weights, weights if runs else "none"),
            Precision(inputs, inputs if runs else "none"), "" if online is None else shape_of_map(online),
            "; ".join(f"{name}: {reason}" for name, reason in why.items()),
        ))  # fmt: skip
    rows = merged(made)
    for row in rows:
        if not row.weights.kept:
            report.problems.append(Problem(
                place(row.blocks, row.group), f"no kernel runs this on {machine.name} ({row.why})",
                "unset PHASEQUANT_KERNEL, or name a kernel that runs it",
            ))  # fmt: skip
    report.problems = together(report.problems)
    return rows


def shape_of_map(entry: Any) -> str:
    """A map as people read it, from its layout."""
    size = str(entry["left"][1])
    if entry["right"] is not None:
        size += f"⊗{entry['right'][1]}"
    elif entry["tail"] > 1:
        size += f"⊗I{entry['tail']}"
    return f"{entry['kind']} {size}" if entry["blocks"] == 1 else f"{entry['kind']} {entry['blocks']} × {size}"


def _target(
    report: Report, config: Any, layout: ModelLayout, model_map: ModelMap, target: str, tensor_parallel: int
) -> None:
    if target == "runtime":
        from phasequant.runtime import can_run_config, window_in

        ok, reason = can_run_config(config)
        if not ok:
            report.problems.append(Problem("model", reason, "take --target hf"))
        elif (window := window_in(config)) is not None:
            report.notes.append(
                f"the runtime has no sliding windows: it refuses a capacity of more than {window} tokens"
            )
    if target == "vllm":
        from phasequant.serving.support import eager, refusals

        report.asked = "PhaseQuant's own rules (kernels, serving.support): its plugin serves this in vLLM"
        for reason in refusals(layout, model_map, tensor_parallel=tensor_parallel):
            report.problems.append(
                Problem("vLLM", f"PhaseQuant's plugin refuses it ({reason})", "else take --target hf")
            )
        if (needs := eager(layout)) is not None:
            report.notes.append(f"serve with --enforce-eager: {needs}")
    if layout.prefix is not None:
        count = len(layout.prefix.tokens)
        how = (
            "PhaseQuant's plugin puts their ids before every prompt, and the stored keys and values in their place"
            if target == "vllm"
            else "their stored 16-bit keys and values stand before every text, and take no place in the cache"
        )
        report.notes.append(f"prefix of {count} token{'s' if count > 1 else ''}: {how}")


def _maps(folder: Path, report: Report, layout: ModelLayout) -> None:
    """Folded: as the manifest tells, since nothing of it is left. Online: as config.json has it."""
    try:
        steps = manifest.read(folder).get("transform") or []
    except PhaseQuantError:
        steps = []
    report.folded = [f"{s['name']} ({s['place']}): {s['matrix']}" for s in steps if s.get("where") == "folded"]
    report.online = [f"input of {group}: {shape_of_map(entry)}" for group, entry in layout.online.items()]
    first = next(iter(layout.kv.values()), None)
    if first is not None and first.qk is not None:
        report.online.append(f"R3 (queries and keys, after RoPE): {shape_of_map(first.qk)}")
    if layout.lowrank is not None:
        ranks = ", ".join(f"{group} {rank}" for group, rank in layout.lowrank.ranks.items())
        report.online.append(f"low-rank branches in {layout.lowrank.dtype}: {ranks}")


def _lanes(report: Report, machine: Machine) -> None:
    """What the kernels' names do not say."""
    kernels = {name for row in report.rows for name in (*LANES, "reference") if name in row.kernel}
    int4 = any(row.inputs.promised.startswith("int4") for row in report.rows)
    if int4 and kernels & set(LANES):
        unit = (
            "these GPUs have a 4-bit unit, which PhaseQuant's kernels do not use for now"
            if machine.capability is not None and (8, 0) <= machine.capability < (9, 0)
            else "this GPU has no 4-bit integer unit, and the gain is in bytes"
        )
        report.notes.append(f"4-bit activations travel in int8 lanes: the same integers; {unit}")
    if "humming-int8" in kernels:
        report.notes.append(
            "humming-int8 rounds scaled sums to 16 bits: its integers are exact, its outputs not to the bit"
        )
    if machine.kind == "cuda" and "reference" in kernels:
        floats = any(row.weights.promised in ("nvfp4", "mxfp4") for row in report.rows)
        what = "NVFP4 and MXFP4 run" if floats else "some linears run"
        report.notes.append(f"{what} by the reference: the promised numbers, by products in fp32, and slow")
    if machine.kind == "cuda" and any(p in machine.packages for p in ("humming", "triton")):
        there = " and ".join(sorted(machine.packages))
        report.notes.append(f"answers hold where {there} {'are' if len(machine.packages) > 1 else 'is'} installed")
    if all(row.weights.promised == SIXTEEN and row.inputs.promised == SIXTEEN for row in report.rows):
        report.notes.append("all linears are in 16 bits")
    report.notes.append("embeddings, norms and head are in 16 bits")
