"""`phasequant push`: a checkpoint goes to the Hugging Face Hub."""

import json
from pathlib import Path
from typing import Annotated

import typer

from phasequant.console import note, out, set_quiet


def push(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="folder of a checkpoint")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hub; made where it does not exist")],
    private: Annotated[bool | None, typer.Option("--private/--public", help="of a repository that is made")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object as the last line of stdout")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress, no notes")] = False,
) -> None:
    """Compare a checkpoint with its manifest and upload it to the Hugging Face Hub."""
    import phasequant

    set_quiet(quiet)
    note(f"comparing {path} with its manifest, then uploading")
    address = phasequant.push(path, repo, private=private)
    out.print(address, markup=False, soft_wrap=True)
    if as_json:
        print(json.dumps({"checkpoint": str(path), "address": address}, ensure_ascii=False), flush=True)
