"""What a run stands in: the device it is given, and Transformers' own voice, kept down while it loads."""

import contextlib
import io
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.utils import logging as transformers_logging

from phasequant.errors import PhaseQuantError


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
    """`auto` is the first CUDA device, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise PhaseQuantError(f"unknown device '{name}': use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise PhaseQuantError(f"the device '{name}' is not supported: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise PhaseQuantError(f"the device '{name}' was asked for; this torch sees {torch.cuda.device_count()} of CUDA")
    return device
