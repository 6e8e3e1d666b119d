"""Errors that a person can act on.

`PhaseQuantError` carries one message: what was wrong, where, and what to do. The command line prints it and exits
with status 2; from Python it is an ordinary exception. Anything else that escapes is a bug of ours.
"""

import difflib
from collections.abc import Iterable


class PhaseQuantError(Exception):
    """Something the caller can mend; the message says what and how."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A clause that names the nearest known word, or all of them: for the end of an error message."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'? (known: {', '.join(names)})"
    return f"known: {', '.join(names)}"
