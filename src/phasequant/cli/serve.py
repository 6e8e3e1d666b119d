"""`phasequant serve`: a checkpoint behind vLLM's OpenAI-compatible server."""

import sys
from typing import Annotated

import typer

from phasequant.console import note
from phasequant.serving.server import Server, run, server

Checkpoint = Annotated[str, typer.Argument(metavar="path", help="a PhaseQuant checkpoint")]


def serve(
    context: typer.Context,
    path: Checkpoint,
    host: Annotated[str, typer.Option("--host", help="address to listen at")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", "-p", help="port to listen at", min=1, max=65535)] = 8000,
    name: Annotated[
        str | None, typer.Option("--name", help="the model's name to clients; default: the folder's")
    ] = None,
    python: Annotated[str | None, typer.Option("--python", help="a Python that has vLLM and phasequant")] = None,
    patience: Annotated[float, typer.Option("--patience", help="seconds until it must be ready")] = 600.0,
) -> None:
    """vLLM's OpenAI-compatible server on a checkpoint, with the flags that keep its numerics. What follows `--` goes to
    vLLM."""
    wanted = server(path, host=host, port=port, python=python or sys.executable, name=name, extra=context.args)
    note(" ".join(wanted.arguments[3:]))
    run(wanted, _ready, patience=patience)
    note("stopped")


def _ready(found: Server) -> None:
    note(
        f"ready: '{found.name}' at {found.url}/v1, health at {found.url}/health; Ctrl-C stops it\n"
        f"  curl {found.url}/v1/completions -H 'Content-Type: application/json' "
        f'-d \'{{"model": "{found.name}", "prompt": "Once upon a time", "max_tokens": 32}}\''
    )
