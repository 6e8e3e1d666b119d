"""Who answers a question about vLLM: an installed vLLM where there is one, else the rules written here.

An installed vLLM is asked by `ask_vllm.py`, run by the Python it is installed for. Of what it cannot say (Humming's
fallbacks, where Humming is not installed beside it) the written rules are asked, and that is told.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from phasequant.doctor import vllm_rules
from phasequant.doctor.question import Answer, Question
from phasequant.errors import PhaseQuantError

SCRIPT = Path(__file__).with_name("ask_vllm.py")
PATIENCE_S = 300


def has_vllm() -> bool:
    """Whether vLLM is installed here (and not merely a folder of that name in sight)."""
    found = importlib.util.find_spec("vllm")
    return found is not None and found.origin is not None


def answers(questions: Sequence[Question], python: str | Path | None = None) -> tuple[list[Answer], str]:
    """An answer to every question, and who gave them. `python`: of the environment whose vLLM is asked; None: this one,
    if vLLM is in it."""
    if python is None and has_vllm():
        python = sys.executable
    if python is None:
        told = f"PhaseQuant's written rules, compared with vLLM {vllm_rules.CHECKED} (--python asks an installed vLLM)"
        if os.environ.get("VLLM_DISABLED_KERNELS"):
            told += "; they do not see VLLM_DISABLED_KERNELS"
        return [vllm_rules.answer(question) for question in questions], told
    return _asked(questions, str(python))


def _asked(questions: Sequence[Question], python: str) -> tuple[list[Answer], str]:
    distinct = list({json.dumps(question.to_dict(), sort_keys=True): question for question in questions}.values())
    given = json.dumps({"questions": [question.to_dict() for question in distinct]})
    try:
        run = subprocess.run(
            [python, str(SCRIPT)], input=given, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PhaseQuantError(
            f"--python {python} cannot be run ({error}): name the Python that vLLM is installed for"
        ) from error
    lines = run.stdout.strip().splitlines()
    try:
        told = json.loads(lines[-1])
        found = told["answers"]
    except (IndexError, ValueError, KeyError, TypeError) as error:
        last = (run.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise PhaseQuantError(
            f"vLLM could not be asked through {python} ({last}): name a Python that has vLLM, or leave --python away "
            "for the written rules"
        ) from error
    who = f"vLLM {told['vllm']}"
    if told["assumed"]:
        who += f", told that {', '.join(told['assumed'])} are there, which a wheel for CUDA brings"
    if any(one["unasked"] for one in found):
        who += f"; where Humming decides, PhaseQuant's written rules, compared with vLLM {vllm_rules.CHECKED}"
    made = {}
    for question, one in zip(distinct, found, strict=True):
        if one.pop("unasked"):
            made[json.dumps(question.to_dict(), sort_keys=True)] = vllm_rules.answer(question)
        else:
            made[json.dumps(question.to_dict(), sort_keys=True)] = Answer(**one)
    return [made[json.dumps(question.to_dict(), sort_keys=True)] for question in questions], who
