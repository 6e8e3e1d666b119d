"""Maps of models: which names are the blocks, norms, linears, heads. Describes architectures, never patches them."""

from phasequant.arch.families import FAMILIES, GROUPS
from phasequant.arch.map import ModelMap, Place, Shape
from phasequant.arch.mixtures import REFUSED
from phasequant.arch.names import Family, GroupNames

__all__ = ["FAMILIES", "GROUPS", "REFUSED", "Family", "GroupNames", "ModelMap", "Place", "Shape"]
