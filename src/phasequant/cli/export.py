"""`phasequant export`: a checkpoint for servers that do not know this package."""

import json
from pathlib import Path
from typing import Annotated

import typer

from phasequant.console import out, set_quiet

Checkpoint = Annotated[str, typer.Argument(help="a PhaseQuant checkpoint")]


def export(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for the stock checkpoint")],
    profile: Annotated[
        str, typer.Option("--profile", "-p", help="ct-w4a16, ct-w4a8, ct-w4a4, ct-nvfp4, ct-mxfp4")
    ] = "ct-w4a16",
    allow: Annotated[
        str, typer.Option("--allow", help="what may be let go, with commas: grid (of inputs), prefix")
    ] = "",
    requantize: Annotated[
        bool, typer.Option("--requantize", help="quantize the source again, with nothing left online")
    ] = False,
    model: Annotated[
        str | None, typer.Option("--model", help="the 16-bit source; default: the one in the manifest")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="quantize again by this one instead of the checkpoint's")
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key of that recipe, as a.b=c")
    ] = None,
    text: Annotated[
        str, typer.Option("--text", help="text to evaluate on: builtin, a UTF-8 file, wikitext2, c4")
    ] = "builtin",
    chunks: Annotated[int, typer.Option("--chunks", help="chunks to evaluate on; 0: measure nothing", min=0)] = 2,
    seqlen: Annotated[int, typer.Option("--seqlen", help="tokens in a chunk")] = 2048,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object as the last line of stdout")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress, no notes")] = False,
) -> None:
    """Write CHECKPOINT in the format of compressed-tensors, for stock vLLM, SGLang and Transformers."""
    from phasequant.export import export as write

    set_quiet(quiet)
    words = [word.strip() for word in allow.split(",") if word.strip()]
    made = write(
        checkpoint, output, profile, allow=words, requantize=requantize, model=model, recipe=recipe,
        overrides=sets or [], text=text, chunks=chunks, seqlen=seqlen, device=device,
    )  # fmt: skip
    for line in (*made.groups, *made.notes):
        out.print(line, markup=False, soft_wrap=True)
    figures = made.figures
    if figures:
        names = {"checkpoint": "checkpoint", "profile": made.profile, "stock": f"{made.profile} in stock Transformers",
                 "weights_alone": "weights alone"}  # fmt: skip
        shown = ", ".join(f"{words} {figures[key]:.3f}" for key, words in names.items() if key in figures)
        where = f"{figures['chunks']} chunks of {figures['seqlen']} tokens, {figures['text']}"
        out.print(f"perplexity: {shown} ({where})", markup=False, soft_wrap=True)
    out.print(f"{output}: {made.profile}; README.md says how to serve it", markup=False, soft_wrap=True)
    if as_json:
        print(json.dumps(made.to_dict(), ensure_ascii=False), flush=True)
