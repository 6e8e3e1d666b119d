"""Numbers of blocks as a person reads them: 3, 4, 5 and 9 are `3-5, 9`."""

from collections.abc import Iterable


def ranges(numbers: Iterable[int]) -> str:
    """Like 0-3, 7; sorted, each once."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
