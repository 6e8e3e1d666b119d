"""Stock checkpoints: what servers that do not know this package can load, in the format of compressed-tensors.

checks      what such a checkpoint cannot hold, and what a user may let go
profiles    the grids of each profile                  config     `quantization_config` in config.json
tensors     codes and scales in its layout             folder     the whole directory, and its page
requantize  the recipe with nothing left online        measure    what was lost
"""

from phasequant.export.profiles import PROFILES, Profile
from phasequant.export.whole import Exported, export

__all__ = ["PROFILES", "Exported", "Profile", "export"]
