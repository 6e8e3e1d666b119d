"""Polish: the few continuous parameters of a quantized model, learned while its codes stay as they are."""

from phasequant.finetune.contract import Polished, PolishTask
from phasequant.finetune.distillation import distill, teach
from phasequant.finetune.reconstruction import Aims, aims, reconstruct

__all__ = ["Aims", "PolishTask", "Polished", "aims", "distill", "reconstruct", "teach"]
