"""Maps of models: which names are the blocks, norms, linears, heads. Describes architectures, never patches them."""

from phasequant.arch.families import FAMILIES, GROUPS, Family, GroupNames
from phasequant.arch.map import ModelMap, Place, Shape

__all__ = ["FAMILIES", "GROUPS", "Family", "GroupNames", "ModelMap", "Place", "Shape"]
