"""How certain a figure is: intervals by resampling whole groups.

Pictures of a group share prompts and early steps, so they are no independent measurements. The cluster bootstrap draws whole groups,
with repetition, as many as there are, and computes the figure anew (Davison and Hinkley, Bootstrap Methods, section 3.8).

    interval(right, groups)                                  # a mean over pictures
    interval(lambda rows: frechet_distance(drawn[rows], real), groups, resamples=200)    # any other figure
    paired_interval(scores_shared, scores_alone, groups)     # the difference on the same prompts and seeds

`resample` keeps the resampled figures, so that one of many methods is compared with many others without computing anything anew.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from sage.evaluation.checks import as_groups
from sage.plan_checks import integer

__all__ = ["Estimate", "Resampled", "interval", "paired_interval", "resample"]

DRAWS = 1 << 22  # groups drawn at once: 32 MiB of int64

Statistic = Callable[[torch.Tensor], float]


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval.

    Args:
        value: on the rows as they are.
        low, high: the interval; None where nothing was resampled.
        n: rows it was computed of.
        groups: groups they are in.
        resamples: of the bootstrap.
        level: the share of intervals that shall hold the true figure.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    groups: int
    resamples: int
    level: float = 0.95

    def as_json(self) -> dict[str, float | int | None]:
        """For JSON; every number is finite."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Resampled:
    """A figure, and what it is on each choice of groups: the same choices for all figures of the same groups, count and seed.

    Args:
        value: on the rows as they are.
        figures: float64 [resamples]; none: there is no interval.
        n: rows.
        groups: how many.
        centred: as in `interval`.
    """

    value: float
    figures: np.ndarray
    n: int
    groups: int
    centred: bool

    def estimate(self, level: float = 0.95) -> Estimate:
        """The figure and its interval."""
        if not len(self.figures):
            return Estimate(self.value, None, None, self.n, self.groups, 0, level)
        low, high = np.quantile(self.figures, [(1 - level) / 2, (1 + level) / 2])
        shift = self.value - self.figures.mean() if self.centred else 0.0
        return Estimate(self.value, float(low + shift), float(high + shift), self.n, self.groups, len(self.figures), level)

    def minus(self, other: "Resampled") -> "Resampled":
        """The difference on the same choices, as `paired_interval` takes it. Raises ValueError for other groups or another count."""
        if (self.n, self.groups, len(self.figures)) != (other.n, other.groups, len(other.figures)):
            raise ValueError(f"Resampled.minus: other must be of the same rows, groups and resamples, {self.n}, {self.groups} and "
                             f"{len(self.figures)}, got {other.n}, {other.groups} and {len(other.figures)}")
        return Resampled(self.value - other.value, self.figures - other.figures, self.n, self.groups, self.centred)


def resample(values: Any, groups: Sequence[Sequence[int]], *, resamples: int = 2000, seed: int = 0,
             centred: bool | None = None) -> Resampled:
    """A mean or another figure of rows, on the rows as they are and on resampled groups.

    Args:
        resamples: 0: the figure alone is wanted.
        values, groups, seed, centred: as in `interval`.

    Raises:
        TypeError, ValueError: as `interval`.
    """
    return _resample("resample", values, groups, integer(resamples, "resample: resamples", 0), seed, centred)


def interval(values: Any, groups: Sequence[Sequence[int]], *, level: float = 0.95, resamples: int = 2000, seed: int = 0,
             centred: bool | None = None) -> Estimate:
    """A mean, or any figure of rows, with its interval from resampled groups.

    Args:
        values: [N] numbers or bools, whose mean over rows is wanted; or a function of int64 [n] row numbers, in which rows may
            come several times, to a number.
        groups: rows that belong together; rows in no group do not count. For single pictures, groups of one.
        level: between 0 and 1.
        resamples: at least 1; a function is called once more than that.
        seed: of the resampling.
        centred: whether to move the resampled figures so that their mean is the value. Needed where doubled rows alone raise a
            figure, as they do all distances between sets: without it, the interval may lie wholly above the value. It is then one
            of the figure's expectation at this number of rows. None: for functions, not for values.

    Returns:
        Estimate with quantiles of the resampled figures as its ends. With fewer than some 20 groups the interval is too narrow.

    Raises:
        TypeError: values or groups of another kind.
        ValueError: values not [N] or not finite, groups as `sage.evaluation.checks.as_groups`, fewer than two groups, or an
            argument out of range.
    """
    return _estimate("interval", values, groups, level, resamples, seed, centred)


def paired_interval(a: Any, b: Any, groups: Sequence[Sequence[int]], *, level: float = 0.95, resamples: int = 2000, seed: int = 0,
                    centred: bool | None = None) -> Estimate:
    """The difference a − b of two methods on the same prompts and seeds, with its interval.

    Both are computed of the same resampled rows, so what makes prompts easy or hard for both cancels.

    Args:
        a, b: both [N] values, row i being the same prompt and seed, or both functions of row numbers; as in `interval`.
        groups, level, resamples, seed, centred: as in `interval`.

    Returns:
        Estimate of the difference.

    Raises:
        TypeError, ValueError: as `interval`; one is a function and the other is not, or two lengths.
    """
    if callable(a) != callable(b):
        raise TypeError("paired_interval: a and b must both be values or both be functions of rows")
    if callable(a):
        return _estimate("paired_interval", lambda rows: a(rows) - b(rows), groups, level, resamples, seed, centred)
    a, b = _values(a, "paired_interval: a"), _values(b, "paired_interval: b")
    if len(a) != len(b):
        raise ValueError(f"paired_interval: a and b must be of the same pictures, got {len(a)} and {len(b)} values")
    return _estimate("paired_interval", a - b, groups, level, resamples, seed, centred)


def _estimate(operation: str, values: Any, groups: Any, level: float, resamples: int, seed: int, centred: bool | None) -> Estimate:
    if not 0 < level < 1:
        raise ValueError(f"{operation}: level must be between 0 and 1, got {level!r}")
    resamples = integer(resamples, f"{operation}: resamples", 1)
    return _resample(operation, values, groups, resamples, seed, centred).estimate(level)


def _resample(operation: str, values: Any, groups: Any, resamples: int, seed: int, centred: bool | None) -> Resampled:
    random = np.random.default_rng(integer(seed, f"{operation}: seed", 0))
    statistic = values if callable(values) else None
    if statistic is None:
        values = _values(values, f"{operation}: values")
    groups = as_groups(groups, np.iinfo(np.int64).max if statistic else len(values), f"{operation}: groups")
    if len(groups) < 2:
        raise ValueError(f"{operation}: groups must be at least two, got {len(groups)}; what one group does says nothing of others")
    if statistic is None:
        value, figures = _means(values, groups, resamples, random)
    else:
        value, figures = _figures(statistic, groups, resamples, random, operation)
    return Resampled(value, figures, sum(map(len, groups)), len(groups), bool(statistic) if centred is None else centred)


def _values(values: Any, name: str) -> np.ndarray:
    """[N] float64, finite."""
    if torch.is_tensor(values):
        values = values.detach().cpu().double().numpy()
    values = np.asarray(values)
    if values.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be numbers or a function of rows, got {values.dtype}")
    if values.ndim != 1:
        raise ValueError(f"{name} must be [N], one number per picture, got {list(values.shape)}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} must be finite, got {int((~np.isfinite(values)).sum())} of {len(values)} that are not; "
                         "leave those rows out of the groups and of the values")
    return values.astype(np.float64)


def _draws(count: int, resamples: int, random: np.random.Generator) -> Iterator[np.ndarray]:
    """Groups drawn with repetition, int64 [some resamples, count], until all resamples are had."""
    step = max(1, DRAWS // count)
    for first in range(0, resamples, step):
        yield random.integers(count, size=(min(step, resamples - first), count))


def _means(values: np.ndarray, groups: list[list[int]], resamples: int, random: np.random.Generator) -> tuple[float, np.ndarray]:
    """The mean over rows, and its resamples: sums of drawn groups over their sizes."""
    sums = np.array([values[group].sum() for group in groups])
    sizes = np.array([len(group) for group in groups], dtype=np.float64)
    means = [sums[drawn].sum(1) / sizes[drawn].sum(1) for drawn in _draws(len(groups), resamples, random)]
    return float(sums.sum() / sizes.sum()), np.concatenate([np.empty(0), *means])


def _figures(statistic: Statistic, groups: list[list[int]], resamples: int, random: np.random.Generator,
             operation: str) -> tuple[float, np.ndarray]:
    """The figure of all rows, and its resamples."""
    rows = [torch.tensor(group) for group in groups]
    value = float(statistic(torch.cat(rows)))
    drawn = (one for some in _draws(len(groups), resamples, random) for one in some.tolist())
    figures = np.array([float(statistic(torch.cat([rows[k] for k in one]))) for one in drawn])
    if not (np.isfinite(value) and np.isfinite(figures).all()):
        raise ValueError(f"{operation}: the function gave {value} on all rows and {int((~np.isfinite(figures)).sum())} figures of "
                         f"{resamples} that are not finite; it must be defined for every choice of groups")
    return value, figures
