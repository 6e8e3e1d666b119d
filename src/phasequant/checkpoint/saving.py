"""What lets a saved folder load by `trust_remote_code=True`: `phasequant_shim.py`, and `auto_map` in config.json.

A user's own `model.save_pretrained(folder)` (and `push_to_hub`, which calls it) shall write them too. Transformers asks
the quantizer for the state dict there, but does not tell it the folder; a method wrapped on the model would have to
hold the model in a cycle, which keeps its memory until the collector comes by. So the folder is read from the caller's
frame: where a Transformers has no such name there, nothing is written, and the folder loads after `import phasequant`.
"""

import shutil
from pathlib import Path
from types import FrameType

from transformers import PreTrainedModel

SHIM = "phasequant_shim.py"
AUTO_MAP = {"AutoConfig": "phasequant_shim.Config"}


def give_shim(model: PreTrainedModel, caller: FrameType | None) -> None:
    """Write the shim into the folder that `save_pretrained`, whose frame `caller` is, is about to fill."""
    known = {} if caller is None or caller.f_code.co_name != "save_pretrained" else caller.f_locals
    folder = Path(known["save_directory"]) if "save_directory" in known else None
    if folder is None or not folder.is_dir():
        if hasattr(model.config, "auto_map"):
            del model.config.auto_map  # it would name a file that is not there
        return
    model.config.auto_map = dict(AUTO_MAP)
    if known.get("is_main_process", True):
        shutil.copyfile(Path(__file__).with_name(SHIM), folder / SHIM)
