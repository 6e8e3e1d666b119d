"""`phasequant chat`: one prompt in, greedy text out."""

from typing import Annotated

import typer

from phasequant.cli.options import Device, Json, Model, Quiet, emit
from phasequant.console import out, set_quiet


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
    emit({"model": model, "prompt": prompt, "text": answer}, as_json)
