"""A doctor that tells the truth: what a checkpoint will really run as, beside what it promises.

whole          one entry                          report     rows, problems, notes
native         PhaseQuant's own checkpoints       native_kv, stored    their KV; the few tensors that decide
stock          compressed-tensors checkpoints     stock_report         what Transformers and vLLM make of them
question, ask  what vLLM is asked, and by whom    vllm_rules, ask_vllm     written rules; the script that asks vLLM
"""

from phasequant.doctor.whole import TARGETS, doctor

__all__ = ["TARGETS", "doctor"]
