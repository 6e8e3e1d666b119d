"""`Seen`: what policies look at: observations by coordinates, the sensitivity and the timings that were measured."""

from phasequant.observe import Observations
from phasequant.plan.prices import Timings
from phasequant.sensitivity import Sensitivity


class Seen:
    """Observations by coordinates; asking for what was not observed is a bug of the pipeline."""

    def __init__(
        self, *observations: Observations, sensitivity: Sensitivity | None = None, timings: Timings | None = None
    ) -> None:
        # Of raw ones the last: behind the prefix, where there is one.
        self._by = {("raw" if o.coordinates.startswith("raw") else "transformed"): o for o in observations}
        self.sensitivity = sensitivity
        self.timings = timings

    def at(self, coordinates: str) -> Observations:
        """`raw` or `transformed`; the raw ones serve both where nothing was transformed."""
        return self._by.get(coordinates) or next(iter(self._by.values()))
