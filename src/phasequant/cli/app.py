"""The command line. Answers go to stdout, progress and warnings to stderr; `--json` makes the last line of stdout one
JSON object. Anything the user can mend ends with exit status 2 and one message."""

import os
import sys
import time
from pathlib import Path

import typer

from phasequant import ranks
from phasequant.cli.analyze import analyze
from phasequant.cli.bench import bench
from phasequant.cli.chat import chat
from phasequant.cli.compare import compare
from phasequant.cli.demo import demo
from phasequant.cli.doctor import doctor
from phasequant.cli.evaluate import evaluate
from phasequant.cli.export import export
from phasequant.cli.push import push
from phasequant.cli.quantize import quantize
from phasequant.cli.recipes import recipes
from phasequant.cli.serve import serve
from phasequant.console import set_quiet, stderr
from phasequant.errors import PhaseQuantError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Quantize language models to W4A4KV4, see where 4 bits break them, and keep the few activations that need it "
    "in 8. MODEL is a Hugging Face directory, a Hub id, a GGUF file, a PhaseQuant checkpoint, or 'demo'.",
)

for command in (demo, analyze, quantize, evaluate, compare, chat, recipes, doctor, export, push):
    app.command("eval" if command is evaluate else None)(command)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve)
app.add_typer(bench, name="bench")


SPREAD = ("quantize", "analyze", "eval")  # commands that several processes share
REPEAT = 5.0  # seconds


def _join() -> None:
    """Take part in a run of several processes, where torchrun started this one; the first of them speaks."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command not in SPREAD:
        raise PhaseQuantError(
            f"torchrun starts several processes, and only {', '.join(SPREAD)} share their work: run "
            f"`phasequant {command}` without it"
        )
    if ranks.start().rank:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
        set_quiet(True)


def _fail(error: str) -> None:
    """One message, status 2. Where the first rank fails likewise, torchrun ends the others before they repeat it."""
    if not ranks.leads():
        time.sleep(REPEAT)
        error = f"rank {ranks.world().rank}: {error}"
    stderr.print(f"error: {error}", markup=False, style="red", soft_wrap=True)
    sys.exit(2)


def main() -> None:
    """Entry point: errors of the user's end with status 2 and one message."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        _join()
        app(standalone_mode=True)
    except SystemExit as end:
        if not end.code:
            ranks.stop()
        raise
    except PhaseQuantError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}")
    except KeyboardInterrupt:
        if not ranks.leads():
            sys.exit(130)
        stderr.print(
            "interrupted: nothing half-written is left; finished blocks and rows that were kept are taken up when the "
            "same command runs again",
            markup=False,
        )
        sys.exit(130)
