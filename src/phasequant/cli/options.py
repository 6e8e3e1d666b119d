"""Options that commands share, and what they say as overrides of a recipe."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from phasequant.errors import PhaseQuantError, did_you_mean

Model = Annotated[str, typer.Argument(help="directory, Hub id, GGUF file, checkpoint, or 'demo'")]
RecipeName = Annotated[str | None, typer.Option("--recipe", "-r", help="a preset's name or a YAML file")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a recipe key, as a.b=c")]
Policy = Annotated[str | None, typer.Option("--policy", help="short for --set policy.name=…")]
Share = Annotated[float | None, typer.Option("--a8-share", help="short for --set policy.a8_share=…")]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        "--allow",
        metavar="KIND=BITS",
        help="let weights or kv share the budget, as in weights=4,8 or kv=4,8 (in bytes)",
    ),
]
Calib = Annotated[str | None, typer.Option("--calib", help="text to calibrate on: short for --set calibration.text=…")]
Seed = Annotated[int | None, typer.Option("--seed", help="short for --set seed=…")]
PlanFile = Annotated[Path | None, typer.Option("--plan", help="a plan to follow, as written by analyze or quantize")]
Tasks = Annotated[str | None, typer.Option("--tasks", help="zero-shot tasks, with commas between: arc_easy,piqa, …")]
TasksDir = Annotated[Path | None, typer.Option("--tasks-dir", help="folder with NAME.jsonl of each task; else the Hub")]
Limit = Annotated[int | None, typer.Option("--limit", help="the first so many questions of each task")]
Batch = Annotated[int, typer.Option("--batch", help="requests of tasks at a time")]
Text = Annotated[str, typer.Option("--text", help="text to evaluate on: builtin, a UTF-8 file, wikitext2, c4")]
Chunks = Annotated[int | None, typer.Option("--chunks", help="evaluate on the first so many chunks; default: all")]
Seqlen = Annotated[int, typer.Option("--seqlen", help="tokens in a chunk")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object as the last line of stdout")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress, no notes")]


def overrides_of(
    sets: list[str] | None,
    policy: str | None,
    share: float | None,
    calib: str | None,
    seed: int | None,
    plan: Path | None = None,
    allow: list[str] | None = None,
) -> list[str]:
    """The short options as overrides, before those of `--set`. A share asks for the policy that spends it."""
    shared = [word for text in allow or [] for word in text.split()]
    if plan is not None and shared:
        raise PhaseQuantError("--plan decides the bits of weights and KV too: leave --allow away")
    if plan is not None and (policy is not None or share is not None):
        raise PhaseQuantError("--plan decides every group's bits: leave --policy and --a8-share away")
    if share is not None and policy is None and not any(s.startswith("policy.name=") for s in sets or []):
        policy = "budget"
    for word in shared:
        kind, _, bits = word.partition("=")
        if kind not in ("weights", "kv"):
            raise PhaseQuantError(f"--allow '{word}': {did_you_mean(kind, ('weights', 'kv'))}, as in weights=4,8")
        raised = [width for width in whole_numbers(bits) if width > 4]
        sets = [f"policy.allow.{kind}={raised}", *(sets or [])]
    if shared:
        policy = policy or "budget"
        sets = ["policy.score=gradient", "policy.price=bytes", *(sets or [])]
    short = {"policy.name": policy, "policy.a8_share": share, "calibration.text": calib, "seed": seed}
    quoted = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in short.items() if value is not None]
    return [*quoted, *(sets or [])]


def tasks_of(tasks: str | None, folder: Path | None, limit: int | None) -> list[str]:
    """--tasks as a list; what speaks of tasks needs some."""
    if tasks is None and (folder is not None or limit is not None):
        raise PhaseQuantError("--tasks-dir and --limit speak of tasks: name some, as in --tasks arc_easy,piqa")
    return listed(tasks or "")


def listed(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def emit(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(values, ensure_ascii=False), flush=True)


def whole_numbers(text: str) -> list[int]:
    """Numbers with commas between."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    wrong = [part for part in parts if not part.isdecimal()]
    if wrong:
        raise PhaseQuantError(f"'{wrong[0]}' is not a whole number: give them with commas between, as in 4,8,16")
    return [int(part) for part in parts]
