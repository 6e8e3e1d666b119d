"""The command line. Answers go to stdout, progress and warnings to stderr; `--json` makes the last line of stdout one
JSON object. Anything the user can mend ends with exit status 2 and one message."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from phasequant.cli_bench import bench, whole_numbers
from phasequant.cli_doctor import doctor
from phasequant.cli_export import export
from phasequant.cli_push import push
from phasequant.cli_serve import serve
from phasequant.console import note, out, set_quiet, stderr
from phasequant.errors import PhaseQuantError, did_you_mean
from phasequant.tables import between, compared_tasks, comparison_table, tasks_table, verdicts_table

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Quantize language models to W4A4KV4, see where 4 bits break them, and keep the few activations that need it "
    "in 8. MODEL is a Hugging Face directory, a Hub id, a GGUF file, a PhaseQuant checkpoint, or 'demo'.",
)

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

app.add_typer(bench, name="bench")
app.command()(doctor)
app.command()(push)
app.command()(export)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve)


def _overrides(
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


def _emit(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(values, ensure_ascii=False), flush=True)


def _blocks(blocks: tuple[int, ...]) -> str:
    if not blocks:
        return "none"
    return f"block{'s' if len(blocks) > 1 else ''} {', '.join(map(str, blocks))}"


def _spikes(report: dict[str, Any]) -> list[str]:
    """The prefix, and which inputs a few tokens dominate, before and behind it."""
    lines = []
    if report["prefix"]:
        tokens = " ".join(map(repr, report["prefix"]["texts"]))
        lines.append(f"prefix ({report['prefix']['method']}): {tokens}, with 16-bit keys and values before every text")
    for side in ("raw", "isolated"):
        seen = report["observations"].get(side)
        if seen:
            top = sorted(seen["groups"], key=lambda g: -g["spike_ratio"])[:3]
            found = ", ".join(f"{g['spike_ratio']:,.0f} × at {g['group']} of block {g['block']}" for g in top)
            lines.append(f"largest token of an input against its median one, {seen['coordinates']}: {found}")
    return lines


def table(rows: list[dict[str, Any]], evaluation: dict[str, Any]) -> Table:
    """Rows of figures as a person reads them."""
    title = f"{evaluation['chunks']} chunks of {evaluation['seqlen']} tokens, {evaluation['text']}"
    shown = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("", no_wrap=True)
    for column in ("ppl", "KL nats", "A8 %", "weights MiB", "KV B/token"):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(
            escape(row["name"]),
            f"{row['ppl']:.3f}" if row["ppl"] is not None else "–",
            f"{row['kl']:.4f}" if row["kl"] is not None else "–",
            f"{100 * row['a8_share']:.1f}"
            + (f" + {100 * single:.1f} of rows" if (single := row.get("row_share")) else ""),
            f"{row['weight_bytes'] / 2**20:.1f}",
            f"{row['kv_bytes_per_token']:,}",
        )
    return shown


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for the report")] = Path("phasequant-demo"),
    text: Text = "builtin",
    calib: Calib = None,
    chunks: Annotated[int, typer.Option("--chunks", help="chunks to evaluate on")] = 4,
    model: Annotated[str, typer.Option("--model", help="another model than the embedded one")] = "demo",
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="another recipe than quarot; flat-quick learns, in minutes on a CPU")
    ] = "quarot",
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize SmolLM2-135M six ways, measure each, and write the report."""
    from phasequant.demo import run_demo

    set_quiet(quiet)
    report, page = run_demo(model, output, text=text, calib=calib, chunks=chunks, device=device, recipe=recipe)
    out.print(table(report["results"], report["evaluation"]))
    out.print(f"report: {page}", soft_wrap=True, markup=False)
    _emit({"report": str(page), "results": report["results"], "evaluation": report["evaluation"]}, as_json)


@app.command()
def analyze(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for report.html, report.json, plan.json")],
    recipe: RecipeName = None,
    sets: Sets = None,
    policy: Policy = None,
    a8_share: Share = None,
    calib: Calib = None,
    seed: Seed = None,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show where 4 bits break MODEL and why, and plan its bits. Quantizes nothing."""
    import phasequant

    set_quiet(quiet)
    overrides = _overrides(sets, policy, a8_share, calib, seed)
    found = phasequant.analyze(model, recipe or "quarot", overrides=overrides, output=output, device=device)
    model_told = found.report["model"]
    for line in model_told["notes"]:
        out.print(f"{model_told['family']}: {line}", markup=False, soft_wrap=True)
    for phase in found.observations[0].phases[:8]:
        count = sum(n for _, n in phase.tokens)
        words = ", ".join(repr(t) for t, _ in phase.tokens[:4])
        who = "the first token" if phase.first_token else f"{count} tokens such as {words}"
        out.print(
            f"{'massive' if phase.massive else 'large'} activation, {abs(phase.peak):,.0f} ({phase.times:,.0f} × the "
            f"median), channel {phase.channel}, {who}: written by {_blocks(phase.written_by)}, "
            f"taken back by {_blocks(phase.taken_back_by)}",
            markup=False,
            soft_wrap=True,
        )
    for line in _spikes(found.report):
        out.print(line, markup=False, soft_wrap=True)
    raised = sorted({block for block, _ in found.plan.raised})
    share = 100 * found.plan.a8_share
    out.print(
        f"plan ({found.plan.policy}): {len(found.plan.raised)} groups in blocks {raised}, A8 share {share:.1f} %"
        if raised
        else f"plan ({found.plan.policy}): no group is raised",
        markup=False,
        soft_wrap=True,
    )
    page = output / "report.html"
    out.print(f"report: {page}", soft_wrap=True, markup=False)
    _emit({"report": str(page), "plan": found.report["plan"], "thresholds": found.report["thresholds"]}, as_json)


@app.command()
def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for the checkpoint")],
    recipe: RecipeName = None,
    sets: Sets = None,
    policy: Policy = None,
    a8_share: Share = None,
    calib: Calib = None,
    seed: Seed = None,
    plan: PlanFile = None,
    allow: Allow = None,
    keep: Annotated[
        Path | None, typer.Option("--save-transform", help="keep the transform too, for transform.method=load")
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option("--stream/--no-stream", help="read and write MODEL block by block; default: where it must"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="try the first blocks; tell peak memory, time and size of the output")
    ] = False,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize MODEL by a recipe (default: quarot) and write a checkpoint."""
    import phasequant
    from phasequant.evaluate import weight_bytes
    from phasequant.nn import kv_bytes_per_token

    set_quiet(quiet)
    overrides = _overrides(sets, policy, a8_share, calib, seed, plan, allow)
    if dry_run:
        if plan is not None or keep is not None:
            raise PhaseQuantError("--dry-run tries the first blocks only: leave --plan and --save-transform away")
        from phasequant.api import predict

        found = predict(model, recipe or "quarot", overrides=overrides, output=output, device=device, stream=stream)
        out.print(str(found), soft_wrap=True, markup=False)
        _emit(found.to_dict(), as_json)
        return
    result = phasequant.quantize(
        model, recipe or "quarot", overrides=overrides, plan=plan, output=output, device=device, stream=stream
    )
    if keep is not None:
        result.save_transform(keep)
    size = weight_bytes(result.model)
    kv_bytes = kv_bytes_per_token(result.model, result.map)
    out.print(
        f"{output}: weights {size / 2**20:.1f} MiB, KV {kv_bytes:,} bytes a token, "
        f"A8 share {100 * result.plan.a8_share:.1f} %" + _more_bits(result.plan),
        soft_wrap=True,
        markup=False,
    )
    summary = {
        "checkpoint": str(output),
        "policy": result.plan.policy,
        "a8_share": result.plan.a8_share,
        "raised": list(result.plan.to_dict()["raised"]),
        "weights_raised": list(result.plan.to_dict()["weights_raised"]),
        "kv_raised": list(result.plan.to_dict()["kv_raised"]),
        "weight_bytes": size,
        "kv_bytes_per_token": kv_bytes,
    }
    _emit(summary, as_json)


def _more_bits(plan: Any) -> str:
    """What a plan gives more bits beside activations."""
    groups, blocks = len(plan.weights_raised), len(plan.kv_raised)
    told = [f"weights of {groups} groups"] if groups else []
    told += [f"KV of {blocks} blocks"] if blocks else []
    return f", more bits for {' and '.join(told)}" if told else ""


@app.command("eval")
def evaluate(
    model: Model,
    text: Annotated[
        str | None,
        typer.Option("--text", help="builtin, a UTF-8 file, wikitext2, c4; default: builtin, or none with --tasks"),
    ] = None,
    chunks: Chunks = None,
    seqlen: Seqlen = 2048,
    recipe: RecipeName = None,
    sets: Sets = None,
    policy: Policy = None,
    a8_share: Share = None,
    calib: Calib = None,
    seed: Seed = None,
    plan: PlanFile = None,
    original: Annotated[str | None, typer.Option("--original", help="the 16-bit model of a checkpoint")] = None,
    tasks: Tasks = None,
    tasks_dir: TasksDir = None,
    limit: Limit = None,
    batch: Batch = 16,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Perplexity of MODEL, its KL to the 16-bit original, and accuracy on zero-shot tasks. With a recipe, policy, --set
    or --plan, MODEL is quantized in memory first."""
    import phasequant

    set_quiet(quiet)
    overrides = _overrides(sets, policy, a8_share, calib, seed, plan)
    if recipe is None and any(option is not None for option in (policy, a8_share, calib, seed)):
        recipe = "quarot"  # what these options speak of; --set alone changes the 16-bit recipe
    result = phasequant.evaluate(
        model,
        text=text,
        chunks=chunks,
        seqlen=seqlen,
        recipe=recipe,
        overrides=overrides,
        plan=plan,
        original=original,
        tasks=_tasks(tasks, tasks_dir, limit),
        tasks_dir=tasks_dir,
        limit=limit,
        batch=batch,
        device=device,
    )
    rows = [{"name": model if len(model) < 40 else Path(model).name, **result}]
    if result["kernels"] and result["ppl_16bit"] is not None:
        rows.insert(
            0,
            {
                "name": "16-bit",
                "ppl": result["ppl_16bit"],
                "kl": 0.0,
                "a8_share": 0.0,
                "weight_bytes": result["weight_bytes_16bit"],
                "kv_bytes_per_token": result["kv_bytes_per_token_16bit"],
            },
        )
    if result["text"] is not None:
        out.print(table(rows, result))
        for line in _intervals(result):
            out.print(line, markup=False, soft_wrap=True)
    if result["tasks"]:
        out.print(tasks_table(result["tasks"], result))
    if result["kernels"]:
        note("kernels: " + ", ".join(f"{name} ({count} linears)" for name, count in result["kernels"].items()))
    _emit(result, as_json)


def _tasks(tasks: str | None, folder: Path | None, limit: int | None) -> list[str]:
    """--tasks as a list; what speaks of tasks needs some."""
    if tasks is None and (folder is not None or limit is not None):
        raise PhaseQuantError("--tasks-dir and --limit speak of tasks: name some, as in --tasks arc_easy,piqa")
    return _listed(tasks or "")


def _intervals(result: dict[str, Any]) -> list[str]:
    """95 % intervals of the perplexities and of their difference."""
    lines = []
    if result["kernels"] and result["interval_16bit"] and result["interval_16bit"]["low"] is not None:
        lines.append(f"16-bit ppl, 95 % interval over chunks: {between(result['interval_16bit'], '.3f')}")
    if result["interval"] and result["interval"]["low"] is not None:
        lines.append(f"ppl, 95 % interval over chunks: {between(result['interval'], '.3f')}")
    found = result["difference"]
    if result["kernels"] and found and found["low"] is not None:
        lines.append(
            f"against 16-bit, paired by chunk: {found['mean']:+.4f} nats a token, 95 % interval "
            f"{between(found, '+.4f')}: {found['verdict']}"
        )
    return lines


@app.command()
def compare(
    model: Model,
    recipes: Annotated[str, typer.Option("--recipes", help="presets or YAML files, with commas between")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="folder for the rows and the page; an interrupted run goes on there")
    ] = Path("phasequant-compare"),
    policies: Annotated[
        str, typer.Option("--policies", help="plans under which each is measured")
    ] = "uniform,paper,budget",
    a8_share: Annotated[float, typer.Option("--a8-share", help="share that the budget plan may spend")] = 0.125,
    weights: Annotated[str | None, typer.Option("--weights", help="short for --set weights.method=…")] = None,
    text: Annotated[
        list[str] | None, typer.Option("--text", help="text to evaluate on, or several: --text a.txt --text c4")
    ] = None,
    calib: Calib = None,
    chunks: Chunks = 4,
    seqlen: Seqlen = 2048,
    sets: Sets = None,
    seed: Seed = None,
    seeds: Annotated[int, typer.Option("--seeds", help="rows of each recipe that draws at random, a seed each")] = 1,
    tasks: Tasks = None,
    tasks_dir: TasksDir = None,
    limit: Limit = None,
    batch: Batch = 16,
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="recipe/plan that all rows are judged against; default: the first")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", help="processes that share the recipes")] = 1,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="write the table as Markdown, too")] = None,
    latex: Annotated[Path | None, typer.Option("--latex", help="write the table as LaTeX, too")] = None,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Any list of recipes on the same work: a row for each recipe and plan, KV in 16 bits and in its own, each with its
    95 % interval and a verdict against the baseline."""
    from phasequant.compare import compare as run_compare
    from phasequant.report import comparison_text

    set_quiet(quiet)
    short = _overrides(sets, None, None, calib, seed)
    if weights is not None:
        short = [f"weights.method={json.dumps(weights)}", *short]
    result, page = run_compare(
        model, _listed(recipes), output=output, policies=_listed(policies), a8_share=a8_share, overrides=short,
        text=text or ["builtin"], chunks=chunks, seqlen=seqlen, tasks=_tasks(tasks, tasks_dir, limit),
        tasks_dir=tasks_dir, limit=limit, batch=batch, seeds=seeds, workers=workers, baseline=baseline, device=device,
    )  # fmt: skip
    for path, form in ((markdown, comparison_text.markdown), (latex, comparison_text.latex)):
        if path is not None:
            comparison_text.write(path, result, form)
    out.print(comparison_table(result))
    out.print(verdicts_table(result))
    if result["original"].get("tasks"):
        out.print(compared_tasks(result))
    out.print(f"page: {page}", soft_wrap=True, markup=False)
    _emit({"page": str(page), **result}, as_json)
    if any(row["error"] for row in result["rows"]):
        raise typer.Exit(1)


def _listed(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


@app.command()
def chat(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="what to answer")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="longest answer", min=1)] = 64,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """One prompt in, greedy text out."""
    import phasequant

    set_quiet(quiet)
    live = out.is_terminal and not as_json
    answer = phasequant.chat(model, prompt, max_new_tokens=max_new_tokens, stream=live, device=device)
    if not live:
        print(answer)
    _emit({"model": model, "prompt": prompt, "text": answer}, as_json)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="print this one, with a comment on every key")] = None,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """List the presets, or print one whole."""
    from phasequant.recipe import Recipe, parts, presets

    if name is not None:
        recipe = Recipe.load(name, sets or [])
        print(recipe.to_yaml(), end="")
        _emit(recipe.to_dict(), as_json)
        return
    shown = Table(box=None, show_header=False, pad_edge=False)
    for preset, line in presets().items():
        shown.add_row(preset, line)
    out.print(shown)
    out.print("\nparts, for `compose:` in a recipe of yours:")
    shown = Table(box=None, show_header=False, pad_edge=False)
    for part, line in parts().items():
        shown.add_row(part, line)
    out.print(shown)
    _emit({"presets": presets(), "parts": parts()}, as_json)


def main() -> None:
    """Entry point: errors of the user's end with status 2 and one message."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app(standalone_mode=True)
    except PhaseQuantError as error:
        stderr.print(f"error: {error}", markup=False, style="red", soft_wrap=True)
        sys.exit(2)
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        stderr.print(f"error: {error.strerror or error}{place}", markup=False, style="red", soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        stderr.print(
            "interrupted: nothing half-written is left; finished blocks and rows that were kept are taken up when the "
            "same command runs again",
            markup=False,
        )
        sys.exit(130)


if __name__ == "__main__":
    main()
