"""From which step count on more steps buy nothing: the cost that any saving is measured from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sage.evaluation.bootstrap import Estimate, resample

__all__ = ["Knee", "Measurement", "find_knee", "within"]


class Measurement:
    """One metric of one method. It is resampled here and once: what it was made of may go, and differences cost nothing.

    Args:
        values: [N], whose mean is the metric; or a function of rows.
        groups: rows of `values` (of the function) that are resampled together; the same for all methods.
        up: whether more is better; None: neither.
        resamples: of the bootstrap; 0: no interval.
    """

    def __init__(self, values: Any, groups: Sequence[Sequence[int]], up: bool | None = True, resamples: int = 2000):
        self.up, self._resampled = up, resample(values, groups, resamples=resamples)

    def estimate(self) -> Estimate:
        """The metric and its interval."""
        return self._resampled.estimate()

    def minus(self, other: Measurement) -> Estimate:
        """The difference to the same metric of another method, on the same prompts and seeds."""
        return self._resampled.minus(other._resampled).estimate()


def within(difference: Estimate, reference: float, up: bool, margin: float) -> bool:
    """Whether the whole interval of a difference is no worse than a margin, relative to the reference's value."""
    allowed = margin * abs(reference)
    return difference.low >= -allowed if up else difference.high <= allowed


@dataclass(frozen=True)
class Knee:
    """Which step count is enough.

    Args:
        steps: the least one at which every metric is within the margin of its best; None: there is no such step count.
        best: metric → the step count at which it is best (the least of those that are equal).
        table: step count → metric → (difference to the best, whether it is within the margin).
    """

    steps: int | None
    best: dict[str, int]
    table: dict[int, dict[str, tuple[Estimate, bool]]]

    def as_json(self) -> dict:
        rows = {steps: {name: {"to_best": difference.as_json(), "within": fits} for name, (difference, fits) in of.items()}
                for steps, of in self.table.items()}
        return {"steps": self.steps, "best": self.best, "table": rows}


def find_knee(measured: Mapping[int, Mapping[str, Measurement]], margin: float) -> Knee:
    """The smallest step count at which every metric's difference to its own best step count stays within the margin.

    Args:
        measured: step count → metric → measurement, the same metrics everywhere, each with `up` True or False.
        margin: relative to the best value.

    Raises:
        ValueError: no step count or no metric.
    """
    if not measured or not all(measured.values()):
        raise ValueError("find_knee: measured must hold a step count with a metric, got none")
    counts, names = sorted(measured), list(next(iter(measured.values())))
    value = {(steps, name): measured[steps][name].estimate().value for steps in counts for name in names}
    best = {name: max(counts, key=lambda steps: value[steps, name] * (1 if measured[steps][name].up else -1)) for name in names}
    table: dict[int, dict[str, tuple[Estimate, bool]]] = {}
    for steps in counts:
        table[steps] = {}
        for name in names:
            top = measured[best[name]][name]
            difference = measured[steps][name].minus(top)
            table[steps][name] = (difference, within(difference, value[best[name], name], bool(top.up), margin))
    fitting = [steps for steps in counts if all(fits for _, fits in table[steps].values())]
    return Knee(min(fitting, default=None), best, table)
