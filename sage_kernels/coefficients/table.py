"""The table itself: its columns, a row by column names, and the checks every solver's rows go through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

COLUMNS = ("p", "q", "u0", "u1", "u2", "u3", "u4", "u5", "a", "b0", "b1", "b2", "e", "c", "s", "clip")
_DEFAULTS = {"u0": 1.0, "s": 1.0, "clip": np.inf}
_READS_HISTORY = {1: ("u3", "b1"), 2: ("u4", "b2"), 3: ("u5",)}  # m_k is read where one of these is not 0


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
    )


def schedule(name: str, values, *, length: int | None = None, start: int = 0) -> np.ndarray:
    """`values` as a float64 vector; checks its length and that `start` is one of its steps."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or (length is not None and len(values) != length):
        wanted = "one dimension" if length is None else f"length {length}"
        raise ValueError(f"{name} must have {wanted}, got shape {values.shape}")
    if not 0 <= start < len(values):
        raise ValueError(f"start must be one of the {len(values)} steps, got {start}")
    return values
