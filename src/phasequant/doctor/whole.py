"""One entry for both kinds of checkpoints."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phasequant.checkpoint import is_checkpoint
from phasequant.checkpoint.guard import check_extent, read_json
from phasequant.doctor import native, stock, stock_report
from phasequant.errors import PhaseQuantError, did_you_mean
from phasequant.kernels import Machine
from phasequant.surroundings import pick_device

TARGETS = ("hf", "runtime", "vllm")
ELSEWHERE = ("humming", "triton")  # what `phasequant[cuda]` brings to a GPU that is not here


def doctor(
    path: str | Path,
    *,
    target: str = "hf",
    gpu: str = "auto",
    verify: bool = True,
    linear_backend: str | Mapping[str, str] = "auto",
    kv_cache_dtype: str = "auto",
    tensor_parallel: int = 1,
    python: str | Path | None = None,
) -> dict[str, Any]:
    """What a checkpoint, PhaseQuant's or of compressed-tensors, will really run as.

    - `target`: hf (Transformers), runtime (PhaseQuant's own), vllm.
    - `gpu`: auto (this machine), cpu, or an architecture that need not be here: sm_80, sm_90, sm_100 …
    - `verify`: compare the files of a PhaseQuant checkpoint with its manifest.
    - `linear_backend`, `kv_cache_dtype`, `tensor_parallel`: as vLLM would be given them; a mapping of kinds of
      quantization to backends is vLLM's `linear_backend_per_quant`.
    - `python`: of the environment whose vLLM is asked; None: this one, or the rules written here.

    A dict with `groups`, `kv`, `folded`, `online`, `notes`, `problems`, and `as_promised`. Raises `PhaseQuantError`
    where PATH is neither kind, or an option is wrong.
    """
    folder = Path(path).expanduser()
    if target not in TARGETS:
        raise PhaseQuantError(f"unknown target '{target}': {did_you_mean(target, TARGETS)}")
    if tensor_parallel < 1:
        raise PhaseQuantError(f"tensor parallelism is over 1 GPU or more, not {tensor_parallel}")
    if not folder.is_dir():
        raise PhaseQuantError(f"there is no folder {folder}: name a checkpoint's")
    if (folder / "config.json").exists():
        read_json(folder / "config.json")
    if target != "vllm" and (linear_backend != "auto" or kv_cache_dtype != "auto" or tensor_parallel > 1 or python):
        raise PhaseQuantError(
            "a linear backend, a KV cache type, tensor parallelism and --python go with --target vllm"
        )
    machine = Machine.of(pick_device("auto")) if gpu == "auto" else Machine.named(gpu, ELSEWHERE)
    if machine.kind == "cpu":
        machine = Machine.of(pick_device("cpu"))
    if is_checkpoint(folder):
        if linear_backend != "auto" or python:
            raise PhaseQuantError(
                "PhaseQuant's plugin brings its own kernels: leave --linear-backend and --python away"
            )
        check_extent(folder)
        try:
            return native.examine(
                folder, target, machine, verify=verify, kv_cache=kv_cache_dtype, tensor_parallel=tensor_parallel
            ).to_dict()
        except PhaseQuantError:
            raise
        except Exception as error:  # of a config that Transformers cannot make a model of
            raise PhaseQuantError(
                f"the checkpoint {folder} cannot be laid out ({type(error).__name__}: {error}): get it again"
            ) from error
    if not stock.is_stock(folder):
        raise PhaseQuantError(
            f"{folder} is neither a PhaseQuant nor a compressed-tensors checkpoint: nothing is promised"
        )
    if target == "runtime":
        raise PhaseQuantError("the runtime runs PhaseQuant's own checkpoints: take --target hf or vllm")
    backend, per_quant = (linear_backend, {}) if isinstance(linear_backend, str) else ("auto", dict(linear_backend))
    found = stock_report.examine(
        folder, target, machine.name, backend=backend, per_quant=per_quant, kv_cache=kv_cache_dtype,
        tensor_parallel=tensor_parallel, python=None if python is None else os.fspath(python),
    )  # fmt: skip
    return found.to_dict()
