"""What a run says while it runs: progress with ETA, notes and warnings, all on stderr; answers go to stdout (`out`).

On a terminal rich draws bars; elsewhere a plain line appears every few seconds, so that logs stay readable.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from phasequant.ranks import leads

PLAIN_EVERY_S = 5.0

WIDE = 150  # columns of a table that goes to a file or a pipe
out = Console(highlight=False, width=None if sys.stdout.isatty() else WIDE)
stderr = Console(stderr=True, highlight=False)
_quiet = False


def set_quiet(quiet: bool) -> None:
    """Silence notes and progress (warnings stay); of several ranks the first alone speaks."""
    global _quiet
    _quiet = quiet or not leads()


def note(text: str) -> None:
    """One line of information."""
    if not _quiet:
        stderr.print(text, markup=False, soft_wrap=True)


def warn(text: str, *, own: bool = False) -> None:
    """Something that is not as asked, but is not an error. Of several ranks the first says it, unless it is the rank's
    `own` affair."""
    if leads() or own:
        stderr.print(f"warning: {text}", markup=False, style="yellow", soft_wrap=True)


class Ticker(Protocol):
    """Counts finished steps."""

    def __call__(self, steps: int = 1) -> None:
        """`steps` more are done."""


def _clock(seconds: float) -> str:
    whole = int(seconds + 0.5)
    return f"{whole // 60}:{whole % 60:02d}"


class Phase(NamedTuple):
    """A piece of work that showed its progress."""

    title: str
    total: int
    seconds: float


_watched: list[Phase] | None = None


@contextmanager
def watched_phases() -> Iterator[list[Phase]]:
    """Collects the pieces of work that end meanwhile."""
    global _watched
    before, _watched = _watched, []
    try:
        yield _watched
    finally:
        _watched = before


@contextmanager
def progress(title: str, total: int) -> Iterator[Ticker]:
    """Show `title` with steps done, elapsed time and ETA until the block ends."""
    start = time.monotonic()
    with _shown(title, total) as tick:
        yield tick
    if _watched is not None:
        _watched.append(Phase(title, total, time.monotonic() - start))


@contextmanager
def _shown(title: str, total: int) -> Iterator[Ticker]:
    if _quiet:
        yield lambda steps=1: None
        return
    if stderr.is_terminal:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=stderr) as bar:
            task = bar.add_task(title, total=total)
            yield lambda steps=1: bar.advance(task, steps)
        return
    start = last = time.monotonic()
    done = 0

    def tick(steps: int = 1) -> None:
        nonlocal done, last
        done += steps
        now = time.monotonic()
        if now - last >= PLAIN_EVERY_S and 0 < done < total:
            last = now
            eta = (now - start) / done * (total - done)
            print(
                f"{title}: {done}/{total}, {_clock(now - start)} gone, ETA {_clock(eta)}", file=sys.stderr, flush=True
            )

    yield tick
    if done:
        print(f"{title}: {done}/{total} in {_clock(time.monotonic() - start)}", file=sys.stderr, flush=True)
