"""Making activations flat: a method chooses maps, `apply` folds them or leaves them online."""

from phasequant.transform.apply import apply
from phasequant.transform.blockwise import learn_blocks, learn_clips
from phasequant.transform.contract import BlockTransform, Method, Task, Transform
from phasequant.transform.dfrot import dfrot
from phasequant.transform.files import load, load_transform, save_transform
from phasequant.transform.flat import flat, flat_draft
from phasequant.transform.frtq import frtq
from phasequant.transform.kept import fingerprint_of
from phasequant.transform.os_plus import os_plus
from phasequant.transform.quarot import fixed_rotations, quarot
from phasequant.transform.smooth import smooth
from phasequant.transform.spin import spin
from phasequant.transform.spin import start as spin_start
from phasequant.transform.wush import wush

METHODS: dict[str, Method] = {
    "none": Method(lambda task: Transform("none")),
    "quarot": Method(quarot),
    "smooth": Method(smooth, needs_tokens=True),
    "os-plus": Method(os_plus, needs_tokens=True),
    "dfrot": Method(dfrot, needs_tokens=True),
    "frtq": Method(frtq, needs_tokens=True),
    "wush": Method(wush, needs_tokens=True),
    "spin": Method(spin, needs_tokens=True, sees_plan=True, rough=spin_start),
    "flat": Method(flat, needs_tokens=True, learns_clips=True, sees_plan=True, rough=flat_draft),
    "load": Method(load),
}
"""Name in the recipe → method."""

__all__ = [
    "METHODS",
    "BlockTransform",
    "Method",
    "Task",
    "Transform",
    "apply",
    "fingerprint_of",
    "fixed_rotations",
    "learn_blocks",
    "learn_clips",
    "load_transform",
    "save_transform",
]
