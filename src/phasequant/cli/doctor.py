"""`phasequant doctor`: what a checkpoint will really run as. Exit status 1 where that is not what it promises."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from phasequant.console import out, set_quiet, stderr
from phasequant.errors import PhaseQuantError

Checkpoint = Annotated[str, typer.Argument(metavar="PATH", help="a PhaseQuant or compressed-tensors checkpoint")]


def backends(text: str) -> str | dict[str, str]:
    """humming, or mixed_precision=humming with commas between."""
    if "=" not in text:
        return text
    pairs = [part.strip().partition("=") for part in text.split(",") if part.strip()]
    if any(not key or not value for key, _, value in pairs):
        raise PhaseQuantError(f"--linear-backend '{text}': name a backend, or kinds as in mixed_precision=humming")
    return {key: value for key, _, value in pairs}


def doctor(
    path: Checkpoint,
    target: Annotated[str, typer.Option("--target", help="hf, runtime, vllm")] = "hf",
    gpu: Annotated[str, typer.Option("--gpu", help="auto, cpu, or an architecture: sm_80, sm_90, sm_100 …")] = "auto",
    no_verify: Annotated[bool, typer.Option("--no-verify", help="do not compare files with the manifest")] = False,
    linear_backend: Annotated[
        str, typer.Option("--linear-backend", help="vLLM's flag; or a kind's, as in mixed_precision=humming")
    ] = "auto",
    kv_cache_dtype: Annotated[str, typer.Option("--kv-cache-dtype", help="vLLM's flag")] = "auto",
    tensor_parallel: Annotated[int, typer.Option("--tensor-parallel-size", help="vLLM's flag")] = 1,
    python: Annotated[Path | None, typer.Option("--python", help="the Python of the vLLM that is asked")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object as the last line of stdout")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no notes")] = False,
) -> None:
    """What will really run, group by group: kernel, precision, what is folded. Status 1 if that breaks a promise."""
    from phasequant.doctor import doctor as examine

    set_quiet(quiet)
    found = examine(
        path, target=target, gpu=gpu, verify=not no_verify, linear_backend=backends(linear_backend),
        kv_cache_dtype=kv_cache_dtype, tensor_parallel=tensor_parallel, python=python,
    )  # fmt: skip
    out.print(table(found))
    _say(found, quiet)
    if as_json:
        print(json.dumps(found, ensure_ascii=False), flush=True)
    for problem in found["problems"]:
        text = f"not as promised: {problem['where']}: {problem['what']}. What to do: {problem['do']}"
        stderr.print(text, markup=False, style="red", soft_wrap=True)
    if found["problems"]:
        raise typer.Exit(1)


def _both(precision: dict[str, Any]) -> str:
    promised, real = escape(precision["promised"]), escape(precision["real"])
    return promised if promised == real else f"{promised} → [red]{real}[/red]"


def table(found: dict[str, Any]) -> Table:
    """Rows as a person reads them; what differs as promised → real."""
    from phasequant.doctor.report import ranges

    title = f"{found['path']} in {found['target']} on {found['device']}"
    shown = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("blocks", "group", "kernel", "weights", "inputs", "online before"):
        shown.add_column(column, overflow="fold")
    for row in found["groups"]:
        shown.add_row(
            ranges(row["blocks"]) or "–", escape(row["group"]), escape(row["kernel"]), _both(row["weights"]),
            _both(row["inputs"]), escape(row["online"]),
        )  # fmt: skip
    for row in found["kv"]:
        shown.add_row(ranges(row["blocks"]), "KV", escape(row["how"]), "", _both(row), "")
    return shown


def _say(found: dict[str, Any], quiet: bool) -> None:
    for name in ("folded", "online"):
        lines = found[name] or ["nothing"]
        out.print(f"{name}: {'; '.join(lines)}", markup=False, soft_wrap=True)
    if not quiet:
        for line in found["notes"]:
            out.print(f"note: {line}", markup=False, soft_wrap=True)
    wrong = len(found["problems"])
    verdict = f"{wrong} thing{'s are' if wrong > 1 else ' is'} not as promised" if wrong else "all as promised"
    out.print(f"{verdict}; by {found['asked']}", markup=False, soft_wrap=True)
