"""Isolating spikes: tokens put into a prefix (QFeP, PrefixQuant), groups left out of the low grid (QFeM)."""

from phasequant.isolate.prefix import Prefix, begin_token, find_prefix
from phasequant.isolate.qfem import Excluded, exclude, search_alpha

__all__ = ["Excluded", "Prefix", "begin_token", "exclude", "find_prefix", "search_alpha"]
