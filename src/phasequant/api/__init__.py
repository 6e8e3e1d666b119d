"""The Python API: what the command line does, in as few lines.

import phasequant

run = phasequant.quantize("demo", "quarot", overrides=["policy.name=budget"])
run.save("smollm2-w4a4kv4")
model = phasequant.load("smollm2-w4a4kv4")
print(phasequant.evaluate("smollm2-w4a4kv4", text="wiki.txt", chunks=4)["ppl"])
"""

from phasequant.api.analyzing import Analysis, analyze, describe
from phasequant.api.arguments import Model, as_plan, as_recipe, as_source
from phasequant.api.chatting import chat
from phasequant.api.evaluating import evaluate, figures, kernels_used
from phasequant.api.quantizing import predict, quantize
from phasequant.api.timing import bench_linears

__all__ = [
    "Analysis",
    "Model",
    "analyze",
    "as_plan",
    "as_recipe",
    "as_source",
    "bench_linears",
    "chat",
    "describe",
    "evaluate",
    "figures",
    "kernels_used",
    "predict",
    "quantize",
]
