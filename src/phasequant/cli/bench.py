"""`phasequant bench`: what is fast here and what is not, with its baselines in the same run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from phasequant.cli.options import Device, Json, Model, Quiet, Sets, whole_numbers
from phasequant.console import note, out, set_quiet

bench = typer.Typer(no_args_is_help=True, help="Time what runs here, with its baselines in the same run.")
HOPPER = (
    "Hopper GPUs have no 4-bit matrix unit: 4-bit activations travel in int8 lanes there, and the gain is in bytes of "
    "weights and KV and in int8 arithmetic"
)

Shape = Annotated[str, typer.Argument(help="a shape by name (llama-3-8b, qwen3-8b …), a model's directory, or 'demo'")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="write the JSON to a file")]
Blocks = Annotated[int | None, typer.Option("--blocks", help="so many blocks instead of the shape's own")]


def _end(result: dict[str, Any], as_json: bool, output: Path | None) -> None:
    if "H100" in result["device"] or "H200" in result["device"]:
        note(HOPPER)
    if output is not None:
        output.write_text(json.dumps(result, indent=1), encoding="utf-8")
    if as_json:
        print(json.dumps(result, ensure_ascii=False), flush=True)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    shown = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for at, column in enumerate(columns):
        shown.add_column(column, justify="right" if at else "left", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    out.print(shown)


@bench.command()
def groups(
    model: Model = "demo",
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="whose grids of weights and activations")] = "quarot",
    sets: Sets = None,
    tokens: Annotated[int, typer.Option("--tokens", help="rows a call")] = 2048,
    bits: Annotated[str, typer.Option("--bits", help="bits of the inputs, with commas between")] = "4,8,16",
    device: Device = "auto",
    as_json: Json = False,
    output: Output = None,
    quiet: Quiet = False,
) -> None:
    """The linears of one block of MODEL by group and bits of their input: the planner's price in microseconds."""
    import phasequant

    set_quiet(quiet)
    result = phasequant.bench_linears(
        model, recipe, overrides=sets or [], tokens=tokens, bits=whole_numbers(bits), device=device
    )
    widths = sorted({row["bits"] for row in result["linears"]})
    rows = []
    for group in dict.fromkeys(row["group"] for row in result["linears"]):
        cells = {row["bits"]: row for row in result["linears"] if row["group"] == group}
        rows.append([group, *(f"{cells[w]['microseconds']:,.0f} ({cells[w]['kernel']})" for w in widths)])
    title = f"{result['model']} on {result['device']}: microseconds for {tokens} rows, median"
    _table(title, ["group", *(f"{width}-bit input" for width in widths)], rows)
    note(result["says"])
    _end(result, as_json, output)


@bench.command()
def linear(
    shape: Shape = "llama-3-8b",
    rows: Annotated[str, typer.Option("--rows", help="rows a call, with commas between")] = "1,16,64,256,1024,4096",
    kernels: Annotated[str, typer.Option("--kernels", help="ours to time by name; default: the one chosen")] = "",
    device: Device = "auto",
    as_json: Json = False,
    output: Output = None,
    quiet: Quiet = False,
) -> None:
    """Stacked linears, rounding included, against bf16, FP8 and INT8 products of the same sizes."""
    from phasequant.arch import ModelMap
    from phasequant.bench.products import time_products
    from phasequant.bench.shapes import shape_of
    from phasequant.surroundings import pick_device

    set_quiet(quiet)
    chosen = [name.strip() or None for name in kernels.split(",")]
    result = time_products(ModelMap.from_config(shape_of(shape)), whole_numbers(rows), pick_device(device), chosen)
    sides = list(dict.fromkeys(side for row in result["linears"] for side in row["microseconds"]))
    shown = []
    for row in result["linears"]:
        times, ratio = row["microseconds"], row["ratio"]
        cells = [f"{times[side]:,.1f} ({ratio[side]:.2f}×)" if side in times else "–" for side in sides]
        shown.append([f"{row['group']} {row['in']}→{row['out']}", str(row["rows"]), *cells, f"{row['roofline']:,.1f}"])
    _table(
        f"{shape} on {result['device']}: microseconds, and times as fast as bf16",
        ["linear", "rows", *sides, "roofline"], shown,
    )  # fmt: skip
    _end(result, as_json, output)


@bench.command()
def entrance(
    shape: Shape = "llama-3-8b",
    rows: Annotated[str, typer.Option("--rows", help="rows a call, with commas between")] = "1,16,4096",
    device: Device = "auto",
    as_json: Json = False,
    output: Output = None,
    quiet: Quiet = False,
) -> None:
    """Norm, gate, maps and rounding in one kernel, against a copy of the bytes that they move."""
    from phasequant.arch import ModelMap
    from phasequant.bench.entrances import time_entrances
    from phasequant.bench.shapes import shape_of
    from phasequant.surroundings import pick_device

    set_quiet(quiet)
    result = time_entrances(ModelMap.from_config(shape_of(shape)), whole_numbers(rows), pick_device(device))
    shown = []
    for row in result["entrances"]:
        times = row["microseconds"]
        for label, taken in times.items():
            if label != "copy":
                cells = [str(row["rows"]), f"{taken:,.1f}", f"{times['copy']:,.1f}", f"{taken / times['copy']:.2f}×"]
                shown.append([f"{row['entrance']}, {label}, {row['width']} wide", *cells])
    title = f"{shape} on {result['device']}: microseconds"
    _table(title, ["before the product", "rows", "fused", "copy of its bytes", "ratio"], shown)
    _end(result, as_json, output)


@bench.command()
def attention(
    shape: Shape = "llama-3-8b",
    batches: Annotated[str, typer.Option("--batches", help="rows that decode at once, with commas between")] = "1,8,32",
    contexts: Annotated[str, typer.Option("--contexts", help="cached tokens")] = "8192,32768,131072",
    device: Device = "auto",
    as_json: Json = False,
    output: Output = None,
    quiet: Quiet = False,
) -> None:
    """Decode attention over a 4-bit cache against flash attention over a bf16 one."""
    from phasequant.arch import ModelMap
    from phasequant.bench.decoding import time_attention
    from phasequant.bench.shapes import shape_of
    from phasequant.surroundings import pick_device

    set_quiet(quiet)
    model_map = ModelMap.from_config(shape_of(shape))
    result = time_attention(model_map.shape, whole_numbers(batches), whole_numbers(contexts), pick_device(device))
    shown = [
        [f"{row['batch']} × {row['context']:,}", f"{row['bf16']:,.1f}", f"{row['kv4']:,.1f}",
         f"{row['bf16'] / row['kv4']:.2f}×", f"{row['roofline']:,.1f}", f"{row['bytes_ratio']:.2f}× fewer"]
        for row in result["attention"]
    ]  # fmt: skip
    title = f"{shape} on {result['device']}: microseconds of one layer's attention for one new token a row"
    _table(title, ["batch × context", "bf16 flash", "KV4", "ratio", "KV4 roofline", "bytes"], shown)
    _end(result, as_json, output)


def _whole(
    shape: str, batches: str, context: int, new: int, blocks: int | None, device: str, as_json: bool,
    output: Path | None, quiet: bool, kind: str,
) -> None:  # fmt: skip
    from phasequant.bench.shapes import shape_of
    from phasequant.bench.whole import Load, time_whole
    from phasequant.surroundings import pick_device

    set_quiet(quiet)
    loads = [Load(batch, context, new) for batch in whole_numbers(batches)]
    result = time_whole(shape_of(shape, blocks), loads, pick_device(device))
    shown = []
    key, unit = ("prefill_seconds", "prefill") if kind == "prefill" else ("token_seconds", "decode")
    for row in result["rows"]:
        name = f"{row['row']}, batch {row['prefill_rows' if kind == 'prefill' and 'prefill_rows' in row else 'batch']}"
        if "failed" in row:
            shown.append([name, "does not fit", "", "", ""])
            continue
        shown.append(
            [name, f"{row[f'{unit}_tokens_per_second']:,.0f}", f"{row['ratio'].get(key, float('nan')):.2f}×",
             f"{row['weight_bytes'] / 2**30:.2f}", f"{row.get('peak_bytes', 0) / 2**30:.2f}"]
        )  # fmt: skip
    title = f"{shape} ({result['blocks']} blocks, random) on {result['device']}: {unit}, {context} tokens of context"
    _table(title, ["model", "tokens/s", "of 16-bit", "weights, GiB", "peak, GiB"], shown)
    _end(result, as_json, output)


Batches = Annotated[str, typer.Option("--batches", help="with commas between")]
Context = Annotated[int, typer.Option("--context", help="tokens before")]


@bench.command()
def prefill(
    shape: Shape = "llama-3-8b", batches: Batches = "1,4,16,32", context: Context = 2048, blocks: Blocks = None,
    device: Device = "auto", as_json: Json = False, output: Output = None, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Whole models of random weights: tokens a second until the first new one."""
    _whole(shape, batches, context, 8, blocks, device, as_json, output, quiet, "prefill")


@bench.command()
def decode(
    shape: Shape = "llama-3-8b", batches: Batches = "1,4,16,32", context: Context = 2048,
    new: Annotated[int, typer.Option("--new", help="tokens to decode")] = 256, blocks: Blocks = None,
    device: Device = "auto", as_json: Json = False, output: Output = None, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Whole models of random weights: tokens a second after the first new one."""
    _whole(shape, batches, context, new, blocks, device, as_json, output, quiet, "decode")


@bench.command()
def quantize(
    shape: Shape = "llama-3-8b",
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="a preset's name or a YAML file")] = "quarot-gptq",
    sets: Sets = None,
    blocks: Blocks = 1,
    device: Device = "auto",
    as_json: Json = False,
    output: Output = None,
    quiet: Quiet = False,
) -> None:
    """Seconds and memory that a recipe takes for blocks of a shape, on random weights."""
    from phasequant.bench.shapes import shape_of
    from phasequant.quantize_bench import time_quantizing
    from phasequant.recipe import Recipe
    from phasequant.surroundings import pick_device

    set_quiet(quiet)
    result = time_quantizing(shape_of(shape, blocks), Recipe.load(recipe, sets or []), pick_device(device))
    shown = [[f"{shape}, {result['blocks']} blocks, {recipe}", f"{result['seconds']:,.1f}"]]
    for part in ("weights", "learning"):
        if result[f"{part}_seconds"] is not None:
            cost = f"{result[f'{part}_seconds']:,.1f}, peak {result[f'{part}_peak_bytes'] / 2**30:.2f} GiB"
            shown.append([f"  {part}", cost])
    _table(f"on {result['device']}", ["", "seconds"], shown)
    _end(result, as_json, output)
