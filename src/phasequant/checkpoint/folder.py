"""A directory that appears whole or not at all: written beside its place under another name, then renamed.

An existing directory is replaced only where it is an earlier result of the same kind and holds nothing else; whoever
writes says so by `ours`, a function of the directory.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from phasequant.errors import PhaseQuantError

Ours = Callable[[Path], bool]


def check_target(target: Path, ours: Ours) -> Path:
    """The real path of an output directory; refused where it cannot be made, or holds what is not an earlier result."""
    target = target.expanduser().resolve()
    if target.is_file():
        raise PhaseQuantError(f"the output {target} is a file: name a new directory")
    if target.is_dir() and any(target.iterdir()) and not ours(target):
        raise PhaseQuantError(f"the output {target} holds other files: name a new or empty directory")
    parent = next(folder for folder in target.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise PhaseQuantError(f"the output {target} cannot be made: {parent} is not a directory that you can write to")
    return target


@contextmanager
def new_folder(target: Path, ours: Ours, needed: int = 0) -> Iterator[Path]:
    """Yields an empty directory to fill; on success it becomes `target`, on any failure it is removed.

    `needed`: bytes that will be written; too little free space is found before the first of them.
    """
    target = check_target(target, ours)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if needed > free:
            raise PhaseQuantError(
                f"{target.parent} has {free / 2**20:.0f} MiB free, and {needed / 2**20:.0f} MiB are needed: "
                "free some space or name another place"
            )
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    except OSError as error:
        raise PhaseQuantError(f"the output {target} cannot be made: {error.strerror or error}") from error
    try:
        yield partial
        partial.chmod(0o755)
        _swap(partial, target)
    except PhaseQuantError:
        raise
    except Exception as error:
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            reason = getattr(error, "strerror", None) or error
            raise PhaseQuantError(
                f"the output {target} could not be written ({reason}): nothing was left of it; "
                "free some space or name another place"
            ) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _swap(partial: Path, target: Path) -> None:
    """Put `partial` in the place of `target`; an earlier result goes only once the new one stands."""
    if not target.is_dir():
        partial.replace(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    old = aside / "it"
    target.rename(old)
    try:
        partial.replace(target)
    except BaseException:
        old.rename(target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
