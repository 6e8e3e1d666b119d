"""`phasequant compare`: any list of recipes on the same work, one row for each recipe, seed and plan.

Every recipe is learned and quantized under each policy (all activations low; DynamicPTQ's set; the budget), and read
with its KV cache in 16 bits and in its own. All rows see the same evaluation chunks and the same questions beside the
same 16-bit original. A recipe whose transform does not see the plan is quantized once and its plans are put on the same
codes; one whose transform is learned for the plan's bits is learned anew for each (of a block-wise method only the
blocks that changed). `seeds`: as many rows of a recipe that draws at random or reads calibration text, one for each
seed from the recipe's on; a seed is of the signs of rotations and of the sequences that are taken from that text.

Each finished row is kept in the output folder under a hash of all that it depends on: an interrupted comparison goes
on where it was, and a longer list of recipes computes only what is new. Rows that failed are tried again. `workers`:
processes that share the recipes; each opens the model for itself.

At the end every row gets the 95 % interval of its perplexity, and its difference to the baseline's with a verdict
(`report.comparison_verdicts`).
"""

from phasequant.compare.kept import is_comparison
from phasequant.compare.run import POLICY_ORDER, compare

__all__ = ["POLICY_ORDER", "compare", "is_comparison"]
