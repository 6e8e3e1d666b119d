"""A directory that appears whole or not at all: written beside its place under another name, then renamed."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phasequant.errors import PhaseQuantError


def check_target(target: Path, marker: str) -> None:
    """Refuse to replace a directory that is not an earlier result (one that holds `marker`)."""
    if target.is_file():
        raise PhaseQuantError(f"the output {target} is a file: name a new directory")
    if target.is_dir() and any(target.iterdir()) and not (target / marker).is_file():
        raise PhaseQuantError(f"the output {target} holds other files: name a new or empty directory")


@contextmanager
def new_folder(target: Path, marker: str, needed: int = 0) -> Iterator[Path]:
    """Yields an empty directory to fill; on success it becomes `target`, on any failure it is removed.

    `needed`: bytes that will be written; too little free space is found before the first of them.
    """
    target = target.expanduser().absolute()
    check_target(target, marker)
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
        old = None
        if target.is_dir():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent)) / "it"
            target.rename(old)
        partial.replace(target)
        if old is not None:
            shutil.rmtree(old.parent, ignore_errors=True)
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
