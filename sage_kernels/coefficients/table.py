"""The table itself: its columns, a row by column names, and the checks every solver's rows go through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

COLUMNS = ("p", "q", "u0", "u1", "u2", "u3", "u4", "u5", "a", "b0", "b1", "b2", "e", "c", "s", "clip")
_DEFAULTS = {"u0": 1.0, "s": 1.0, "clip": np.inf}
_READS_HISTORY = {1: ("u3", "b1"), 2: ("u4", "b2"), 3: ("u5",)}  # m_k is read where one of these is not 0


class Levels(NamedTuple):
    """The noise levels of the steps that a table's rows end, x = alpha*x0 + sigma*noise, and the x0 that each row predicts.

    The second row of a two-stage step has the levels of the whole step.
    """

    begin: np.ndarray  # float64 [S, 2], (alpha, sigma) where the step began
    end: np.ndarray  # float64 [S, 2], (alpha, sigma) where it ends
    clean: np.ndarray  # float64 [S, 2], weights of (x, m0) in x0


@dataclass(frozen=True, eq=False)
class CoefficientTable:
    """One row of coefficients per denoiser call (columns: `COLUMNS`, meaning: `sage_kernels.coefficients`).

    Args:
        solver: name of the solver, as shown to the user.
        rows: float64 [S, 16]; zero before the first row that runs. Read-only.
        timesteps: float64 [S], what the denoiser is called with at each row.
        input_scale: the first model input is `x * input_scale`.
        history: how many of m1..m3 any row reads (0..3).
        corrector: some row reads L, so the xc of every call must be kept for the next one.
        stochastic: some row has c != 0.
        stage: int64 [S]; 0: a step ends with this row, rows may branch after it. 1: mid-step (Heun), they may not.
        returned: float64 [S, 2], weights of (x, m0) in the sample that diffusers' `step` returns beside x'; None: it is m0.
        levels: None where what is stored is no denoised sample: it would not fit a sample with other noise.
    """

    solver: str
    rows: np.ndarray
    timesteps: np.ndarray
    input_scale: float
    history: int
    corrector: bool
    stochastic: bool
    stage: np.ndarray
    returned: np.ndarray | None = None
    levels: Levels | None = None
    _tensors: dict = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> np.ndarray:
        """float64 [S]: one column by its name in `COLUMNS`."""
        return self.rows[:, COLUMNS.index(name)]

    def tensor(self, device: torch.device | str) -> torch.Tensor:
        """float32 [S, 16] on `device`; made once per device and shared, so do not write to it."""
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if device not in self._tensors:
            with torch.inference_mode(False):  # the cached tensor must stay usable where gradients are recorded
                self._tensors[device] = torch.from_numpy(self.rows.astype(np.float32)).to(device)
        return self._tensors[device]


def row(**coefficients: float) -> np.ndarray:
    """float64 [16]: a row by column names; what is not given is 0, except u0 = 1, s = 1, clip = inf."""
    unknown = coefficients.keys() - set(COLUMNS)
    if unknown:
        raise TypeError(f"row: unknown columns {sorted(unknown)}; the columns are {', '.join(COLUMNS)}")
    return np.array([coefficients.get(name, _DEFAULTS.get(name, 0.0)) for name in COLUMNS], dtype=np.float64)


def build(
    solver: str,
    rows: Sequence[np.ndarray],
    timesteps: np.ndarray,
    *,
    start: int = 0,
    input_scale: float = 1.0,
    stage: np.ndarray | None = None,
    returned: np.ndarray | None = None,
    levels: Levels | None = None,
) -> CoefficientTable:
    """Put zero rows before `start`, refuse rows that are not finite, and read the flags off the coefficients."""
    table = np.zeros((len(timesteps), len(COLUMNS)))
    table[start:] = np.stack(rows) + 0.0  # + 0.0 turns -0.0 into 0.0
    for i, coefficients in enumerate(table[start:], start):
        bad = [n for n, k in zip(COLUMNS, coefficients) if not np.isfinite(k) and n != "clip"]
        if bad or np.isnan(coefficients[-1]):
            raise NotImplementedError(
                f"{solver}: row {i} (timestep {timesteps[i]:g}) has no finite coefficient {', '.join(bad) or 'clip'}: "
                "the noise levels around it are equal, zero or out of order for this formula"
            )
    used = {n: bool(table[:, j].any()) for j, n in enumerate(COLUMNS)}
    table.setflags(write=False)
    return CoefficientTable(
        solver=solver,
        rows=table,
        timesteps=np.asarray(timesteps, dtype=np.float64),
        input_scale=float(input_scale),
        history=max((k for k, names in _READS_HISTORY.items() if any(used[n] for n in names)), default=0),
        corrector=used["u1"],
        stochastic=used["c"],
        stage=np.zeros(len(timesteps), dtype=np.int64) if stage is None else stage,
        returned=returned,
        levels=levels,
    )


def levels(alphas, sigmas, *, begin: Sequence[int] | None = None, clean=(0.0, 1.0)) -> Levels:
    """The levels of S steps on a schedule.

    Args:
        alphas, sigmas: [S + 1], before each step and after the last; one alpha for all is enough.
        begin: [S], the index of the level where the step that row i ends began; None: i.
        clean: weights of (x, m0) in x0, [2] or [S, 2].
    """
    pairs = np.stack(np.broadcast_arrays(np.asarray(alphas, dtype=np.float64), np.asarray(sigmas, dtype=np.float64)), axis=1)
    steps = len(pairs) - 1
    first = pairs[:-1] if begin is None else pairs[np.asarray(begin)]
    return Levels(first, pairs[1:], np.broadcast_to(np.asarray(clean, dtype=np.float64), (steps, 2)))


def schedule(name: str, values, *, length: int | None = None, start: int = 0) -> np.ndarray:
    """`values` as a float64 vector; checks its length and that `start` is one of its steps."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or (length is not None and len(values) != length):
        wanted = "one dimension" if length is None else f"length {length}"
        raise ValueError(f"{name} must have {wanted}, got shape {values.shape}")
    if not 0 <= start < len(values):
        raise ValueError(f"start must be one of the {len(values)} steps, got {start}")
    return values
