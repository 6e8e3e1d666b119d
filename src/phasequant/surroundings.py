"""What a run stands in: the device it is given, and Transformers' own voice, kept down while it loads."""

import contextlib
import io
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from phasequant.errors import PhaseQuantError
from phasequant.ranks import world

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
RESET_PEAK = "5"  # of the resident set, see proc(5)


@dataclass
class Cost:
    """What a piece of work took. `peak_bytes`: most memory held during it: of the CUDA device where it ran on one, else
    of the whole process."""

    seconds: float = 0.0
    peak_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def _peak_resident() -> int:
    if STATUS.is_file():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def measured(device: torch.device) -> Iterator[Cost]:
    """Time and peak memory of a piece of work; filled in when it ends."""
    cost = Cost()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # not Linux, or not allowed: the peak is then that of the whole run
            CLEAR_REFS.write_text(RESET_PEAK)
    start = time.monotonic()
    yield cost
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    cost.seconds = round(time.monotonic() - start, 3)
    cost.peak_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_resident()


@contextmanager
def hushed_transformers() -> Iterator[None]:
    """Transformers without its progress bars and advice, for the time of a load."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader's bar ignores the switch above
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()


def pick_device(name: str) -> torch.device:
    """`auto` is the first CUDA device, else the CPU; of a run of several processes each has its own (`cuda` too)."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and world().size > 1:
        name = f"cuda:{world().local}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise PhaseQuantError(f"unknown device '{name}': use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise PhaseQuantError(f"the device '{name}' is not supported: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise PhaseQuantError(f"the device '{name}' was asked for; this torch sees {torch.cuda.device_count()} of CUDA")
    return device
