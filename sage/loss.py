"""What sharing costs in quality, as far as it can be foretold: a loss for every likeness and share.

    loss = LossTable.default()
    loss(0.7, 0.4)        # lost by a picture whose group, cosine 0.7 at least, runs as one row for 40 % of the calls

The unit is that of whatever was measured; for the table that ships, the scorer's cosine of picture and prompt. A picture that
runs in nodes of heights h₁ until β₁, h₂ until β₂ and so on loses Σ_k [L(h_k, β_k) − L(h_k, β_{k−1})] with β₀ = 0.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sage.plan_checks import items

__all__ = ["LossTable"]

SHIPPED = Path(__file__).with_name("loss_table.json")
FORMAT, VERSION = "sage-diffusion loss table", 1
SLACK = 1e-9  # of the largest loss: what the shape of a table may be off by, for rounding
STEPS = 21  # values on each axis of a fitted table
EXPONENTS = {"a": (1e-3, 8.0), "b": (1.0, 8.0)}  # where `fit` looks


@dataclass(frozen=True, eq=False)
class LossTable:
    """Expected loss of one picture over similarity and share, bilinear between the values.

    Args:
        similarity: [m] ascending cosines in [-1, 1], m ≥ 2, the last 1; below the first, the first counts.
        share: [k] ascending from 0 to 1, k ≥ 2.
        loss: [m, k], finite, ≥ 0; 0 at share 0 and at similarity 1; never rising with similarity; convex in share, and so
            is what a row exceeds the next one by. Then being split saves the more the later the call.
        provenance: how it was made, for the record; anything that JSON holds.

    Raises:
        TypeError, ValueError: naming the place.
    """

    similarity: np.ndarray
    share: np.ndarray
    loss: np.ndarray
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        similarity, share = _axis(self.similarity, "similarity", -1.0), _axis(self.share, "share", 0.0)
        loss = _numbers(self.loss, "loss", 2)
        if loss.shape != (len(similarity), len(share)):
            raise ValueError(f"LossTable: loss must be [{len(similarity)}, {len(share)}], a row for each similarity and a column "
                             f"for each share, got {list(loss.shape)}")
        if loss.size and not (loss.max() == 0 or 1e-100 <= loss.max() <= 1e100):
            raise ValueError(f"LossTable: the largest loss must be 0 or in [1e-100, 1e100], got {loss.max():g}; choose another unit")
        if share[0] != 0.0:
            raise ValueError(f"LossTable: share must begin with 0, got {share[0]}")
        if not isinstance(self.provenance, Mapping):
            raise TypeError(f"LossTable: provenance must be a dict, got {type(self.provenance).__name__}")
        _check_shape(similarity, share, loss)
        for name, value in (("similarity", similarity), ("share", share), ("loss", loss)):
            value.setflags(write=False)
            object.__setattr__(self, name, value)

    def __call__(self, similarity: Any, share: Any) -> np.ndarray:
        """The loss, float64 in the common shape of both.

        Args:
            similarity: cosines, a number or an array; those below the table's first count as it, those above 1 as 1.
            share: in [0, 1], a number or an array that broadcasts with `similarity`.
        """
        similarity, share = np.asarray(similarity, dtype=np.float64), np.asarray(share, dtype=np.float64)
        if similarity.size and np.isnan(similarity).any():
            raise ValueError("LossTable: similarity must be numbers, got NaN")
        if share.size and not ((share >= 0) & (share <= 1)).all():
            raise ValueError(f"LossTable: share must be in [0, 1], got {share.min()} … {share.max()}")
        row, down = _between(self.similarity, similarity)
        column, across = _between(self.share, share)
        upper = self.loss[row, column] * (1 - across) + self.loss[row, column + 1] * across
        lower = self.loss[row + 1, column] * (1 - across) + self.loss[row + 1, column + 1] * across
        return upper * (1 - down) + lower * down

    @classmethod
    def default(cls) -> "LossTable":
        """The table that ships: the embedded model's, see its `provenance`."""
        return _shipped()

    @classmethod
    def fit(cls, similarity: Any, share: Any, loss: Any, provenance: Mapping[str, Any] | None = None) -> "LossTable":
        """The table of k·(1 − similarity)^a·share^b that is nearest to measured losses in the mean square.

        Args:
            similarity: float [n], cosines in [-1, 1] of the least similar pair of each picture's group, n ≥ 3.
            share: float [n], in [0, 1].
            loss: float [n], quality unshared minus shared. Single values may be negative.
            provenance: for the record; the fit adds "k", "a" (> 0), "b" (≥ 1), "samples" and "residual", the root of the
                mean square of what the fit leaves over.

        Raises:
            ValueError: wrong shapes, or losses that do not grow with share and distance at all.
        """
        similarity, share, loss = (_numbers(value, name, 1) for value, name in
                                   ((similarity, "similarity"), (share, "share"), (loss, "loss")))
        if not len(similarity) == len(share) == len(loss) >= 3:
            raise ValueError(f"LossTable.fit: similarity, share and loss must be of one length, 3 or more, got {len(similarity)}, "
                             f"{len(share)} and {len(loss)}")
        if similarity.min() < -1 or similarity.max() > 1 + 1e-6 or share.min() < 0 or share.max() > 1:
            raise ValueError(f"LossTable.fit: similarity must be in [-1, 1] and share in [0, 1], got {similarity.min()} … "
                             f"{similarity.max()} and {share.min()} … {share.max()}")
        k, a, b = fit_power(1 - similarity.clip(max=1), share, loss)
        if k == 0:
            raise ValueError("LossTable.fit: loss must grow with share and with distance (1 − similarity), but it does not at all; "
                             "measure more pictures, of less similar prompts and at higher shares")
        left = loss - k * (1 - similarity.clip(max=1)) ** a * share**b
        found = {"k": k, "a": a, "b": b, "samples": len(loss), "residual": float(np.sqrt(np.mean(left**2)))}
        return cls.power(k, a, b, {**(provenance or {}), **found})

    @classmethod
    def power(cls, k: float, a: float, b: float, provenance: Mapping[str, Any] | None = None) -> "LossTable":
        """The table of k·(1 − similarity)^a·share^b with k ≥ 0, a > 0, b ≥ 1, on steps of 0.05 between 0 and 1."""
        if not (k >= 0 and a > 0 and b >= 1):
            raise ValueError(f"LossTable.power: k must be at least 0, a above 0 and b at least 1, got k={k}, a={a}, b={b}")
        steps = np.round(np.linspace(0, 1, STEPS), 9)
        return cls(steps, steps, k * np.outer((1 - steps) ** a, steps**b), provenance or {"k": k, "a": a, "b": b})

    def save(self, path: str | Path) -> None:
        """Write a JSON file, UTF-8; `load` reads it back unchanged."""
        lists = {name: getattr(self, name).tolist() for name in ("similarity", "share")}
        head = json.dumps({"format": FORMAT, "version": VERSION, "provenance": dict(self.provenance), **lists}, indent=1,
                          ensure_ascii=False)
        rows = ",\n".join("  " + json.dumps(row) for row in self.loss.tolist())
        Path(path).write_text(f'{head[:-2]},\n "loss": [\n{rows}\n ]\n}}\n', encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "LossTable":
        """Read a file that `save` wrote. What is no such file raises ValueError naming it."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"LossTable.load: {path} must be JSON that LossTable.save wrote, got {error}") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != VERSION:
            raise ValueError(f"LossTable.load: {path} must be a {FORMAT!r} of version {VERSION}; write one with LossTable.save")
        missing = [key for key in ("similarity", "share", "loss") if key not in data]
        if missing:
            raise ValueError(f"LossTable.load: {path} must hold {', '.join(missing)}, but does not")
        return cls(data["similarity"], data["share"], data["loss"], data.get("provenance", {}))


@functools.cache
def _shipped() -> LossTable:
    return LossTable.load(SHIPPED)


def fit_power(distance: np.ndarray, share: np.ndarray, loss: np.ndarray) -> tuple[float, float, float]:
    """(k, a, b) of the least-squares k·distance^a·share^b within EXPONENTS, k ≥ 0; distance = 1 − similarity, all [n].

    For given exponents the best k is known, so only these are searched: a grid around the best pair, narrowed again and again.
    """
    (low_a, high_a), (low_b, high_b) = EXPONENTS["a"], EXPONENTS["b"]
    width_a, width_b = high_a - low_a, high_b - low_b
    best_a, best_b = (low_a + high_a) / 2, (low_b + high_b) / 2
    for _ in range(40):
        a = np.clip(best_a + width_a * np.linspace(-0.5, 0.5, 17), low_a, high_a)
        b = np.clip(best_b + width_b * np.linspace(-0.5, 0.5, 17), low_b, high_b)
        of_distance, of_share = distance ** a[:, None], share ** b[:, None]
        matched = (of_distance * loss) @ of_share.T
        power = of_distance**2 @ (of_share**2).T
        gain = np.where(matched > 0, matched**2 / np.maximum(power, 1e-300), 0.0)  # what the squares shrink by
        row, column = np.unravel_index(gain.argmax(), gain.shape)
        if gain[row, column] == 0:
            return 0.0, best_a, best_b
        best_a, best_b, best_k = a[row], b[column], matched[row, column] / power[row, column]
        width_a, width_b = width_a * 0.6, width_b * 0.6
    return float(best_k), float(best_a), float(best_b)


def _between(grid: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of the grid point at or below each value, at most the last but one, and how far it is to the next, in [0, 1]."""
    values = np.clip(values, grid[0], grid[-1])
    index = np.clip(np.searchsorted(grid, values, side="right") - 1, 0, len(grid) - 2)
    return index, (values - grid[index]) / (grid[index + 1] - grid[index])


def _numbers(values: Any, name: str, ndim: int) -> np.ndarray:
    """A float64 copy of finite numbers with `ndim` axes."""
    try:
        found = np.array(items(values, f"LossTable: {name}"), dtype=np.float64)
    except ValueError:
        raise ValueError(f"LossTable: {name} must be numbers in rows of one length") from None
    if found.ndim != ndim or found.size == 0:
        raise ValueError(f"LossTable: {name} must have {ndim} axes and hold something, got {list(found.shape)}")
    if not np.isfinite(found).all():
        raise ValueError(f"LossTable: {name}{np.argwhere(~np.isfinite(found))[0].tolist()} must be finite")
    return found


def _axis(values: Any, name: str, lowest: float) -> np.ndarray:
    axis = _numbers(values, name, 1)
    falls = np.flatnonzero(np.diff(axis) <= 0)
    if len(axis) < 2 or len(falls):
        place = f"{name}[{falls[0] + 1}] does not rise" if len(falls) else f"{len(axis)} values"
        raise ValueError(f"LossTable: {name} must be at least two values in ascending order, but {place}")
    if axis[0] < lowest or axis[-1] != 1.0:
        raise ValueError(f"LossTable: {name} must begin at {lowest:g} or above and end with 1, got {axis[0]} … {axis[-1]}")
    return axis


def _check_shape(similarity: np.ndarray, share: np.ndarray, loss: np.ndarray) -> None:
    """Refuse losses on which plans would not be in order; see `LossTable`."""
    slack = SLACK * np.abs(loss).max()

    def refuse(bad: np.ndarray, wanted: str, offset: tuple[int, int] = (0, 0)) -> None:
        if bad.any():
            row, column = (np.argwhere(bad)[0] + offset).tolist()
            raise ValueError(f"LossTable: loss[{row}, {column}] = {loss[row, column]:g} (similarity {similarity[row]:g}, share "
                             f"{share[column]:g}) {wanted}")

    refuse(loss < 0, "must be at least 0")
    refuse((loss != 0) & (share == 0), "must be 0, as nothing is shared")
    refuse((loss != 0) & (similarity == 1)[:, None], "must be 0, as the prompts are alike")
    refuse(np.diff(loss, axis=0) > slack, "must not be above that of the next lower similarity", (1, 0))
    slope = np.diff(loss, axis=1) / np.diff(share)
    refuse(slope < -slack, "must not be below that of the share before it", (0, 1))
    refuse(np.diff(slope, axis=1) < -slack / np.diff(share).min(), "bends the wrong way: loss must be convex in share", (0, 1))
    excess = -np.diff(slope, axis=0)  # how much faster a row rises than the next
    refuse(np.diff(excess, axis=1) < -slack / np.diff(share).min(),
           "bends the wrong way: what a similarity loses more than the next must be convex in share", (0, 1))
