"""The work directory of a run: `.NAME.work` beside its output NAME. What is finished of it outlives any crash.

One run at a time (of several ranks the first has the lock): it is one of the operating system, which ends with the
process however that ends. Whoever has it also removes what an earlier run that was killed left half-written. A finished
run removes the directory.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phasequant.console import note
from phasequant.errors import PhaseQuantError
from phasequant.ranks import leads

LOCK = "lock"


class Work:
    """`folder` holds the artifacts; made by `Work.beside`."""

    def __init__(self, folder: Path, target: Path) -> None:
        self.folder, self.target = folder, target

    @classmethod
    @contextmanager
    def beside(cls, target: Path) -> Iterator["Work"]:
        """The work directory of an output, locked. It stays where the run fails or is stopped, and something in it is
        worth going on from."""
        target = target.expanduser().resolve()
        folder = target.parent / f".{target.name}.work"
        if not leads():
            yield cls(folder, target)
            return
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            handle = _lock(folder, target)
        except OSError as error:
            raise PhaseQuantError(
                f"the work directory {folder} cannot be made ({error.strerror or error}): name another output"
            ) from error
        try:
            for pattern in (f".{target.name}.partial-*", f".{target.name}.old-*"):
                for stale in target.parent.glob(pattern):
                    _clean(stale, target)
            yield cls(folder, target)
            shutil.rmtree(folder, ignore_errors=True)
        except BaseException:
            if not any(folder.glob("*.json")):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            os.close(handle)

    def tell(self) -> None:
        """Say what is there to go on from."""
        found = len(list(self.folder.glob("*.json")))
        if found:
            note(f"{found} blocks of an earlier run are in {self.folder}: those that fit are taken")


def _clean(stale: Path, target: Path) -> None:
    """Take away what a killed run left; an earlier result that it had moved aside goes back."""
    kept = stale / "it"
    if kept.is_dir() and not target.exists():
        kept.rename(target)
    shutil.rmtree(stale, ignore_errors=True)


def _lock(folder: Path, target: Path) -> int:
    while True:
        folder.mkdir(exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(handle, 32).decode(errors="replace").strip()
            os.close(handle)
            if isinstance(error, BlockingIOError):
                raise PhaseQuantError(
                    f"another run (process {owner or 'unknown'}) is writing {target}: wait for it, or name another "
                    "output"
                ) from error
            raise
        try:
            if os.fstat(handle).st_ino == (folder / LOCK).stat().st_ino:
                os.truncate(handle, 0)
                os.write(handle, str(os.getpid()).encode())
                return handle
        except FileNotFoundError:
            pass
        os.close(handle)  # the run before removed it meanwhile
