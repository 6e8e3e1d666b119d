"""Checkpoints: native save and load, the manifest, the Transformers quantizer, and the way to the Hub."""

from phasequant.checkpoint import manifest
from phasequant.checkpoint.folder import check_target, new_folder
from phasequant.checkpoint.hf import mark_quantized, register
from phasequant.checkpoint.hub import push
from phasequant.checkpoint.manifest import is_checkpoint
from phasequant.checkpoint.native import load, read_plan, save, versions

__all__ = [
    "check_target",
    "is_checkpoint",
    "load",
    "manifest",
    "mark_quantized",
    "new_folder",
    "push",
    "read_plan",
    "register",
    "save",
    "versions",
]
