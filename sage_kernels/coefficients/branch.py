"""The stochastic form of a step, for rows that come from one row and get noise of their own on the way."""

from __future__ import annotations

import numpy as np

from .table import COLUMNS, CoefficientTable

_CORRECTOR = [COLUMNS.index(name) for name in ("u0", "u1", "u2", "u3", "u4", "u5")]
_UPDATE = [COLUMNS.index(name) for name in ("a", "b0", "b1", "b2", "e")]
_U0, _A, _B0, _C = (COLUMNS.index(name) for name in ("u0", "a", "b0", "c"))
PARTING, PARTED = 1, 2  # what a row of the table may be besides itself; see `branch_rows`


def branch_rows(table: CoefficientTable, eta: float) -> np.ndarray:
    """The rows of a table, and those for rows that part from the others of one parent.

    DDIM (arXiv:2010.02502, Eq. 12) may replace a part of the noise in x' by fresh noise of standard deviation c:

        x' = alpha'*x0 + sqrt(sigma'^2 - c^2)*eps + c*noise,   c = eta*sigma'*sqrt(1 - (sigma'*alpha)^2/(sigma*alpha')^2)

    With alpha^2 + sigma^2 = 1 this c is Eq. 16; with alpha = 1 and eta = 1 it is sigma_up of k-diffusion's ancestral step;
    alpha = 1 - sigma is flow matching. In general it is eta times the deviation of x' given x and x0. For any solver eps is
    taken from where its own step ends: with D its x' without noise of its own, and c_s the deviation of that,

        eps = (D - alpha'*x0)/sqrt(sigma'^2 - c_s^2)

    so that eta = 0 is the solver's own step whatever its order, and for a first-order solver the above is DDIM's. A stochastic
    solver keeps its own step where c_s is the larger deviation.

    A corrector (UniPC) would go back to the sample before the noise, and so discard it: the call after a parting has none.
    Stored denoised samples stay valid, since they do not depend on the noise.

    Args:
        eta: strength of the noise, in [0, 1].

    Returns:
        float64 [4*S, 16]. Row i + S*kind is row i of the table as taken by a row of `kind`: 0: any other; `PARTING`: it
        has a parent in common with others; `PARTED`: the call after that; `PARTING` + `PARTED`: both.

    Raises:
        NotImplementedError: the solver stores something other than the denoised sample.
    """
    if table.levels is None:
        raise NotImplementedError(
            f"{table.solver}: what it stores is no denoised sample, and would not fit a sample with noise of its own; take ddim, "
            "euler, dpm++2m, unipc or flow-euler, for example"
        )
    parted = _uncorrected(table)
    return np.concatenate([table.rows, _noisy(table.rows, table, eta), parted, _noisy(parted, table, eta)])


def _uncorrected(table: CoefficientTable) -> np.ndarray:
    """The rows with xc = x where a step begins: second stages need their L."""
    rows, begins = table.rows.copy(), np.append(True, table.stage[:-1] == 0)
    corrected = begins & rows[:, _CORRECTOR].any(axis=1)  # not those before the first row that runs
    rows[np.ix_(corrected, _CORRECTOR)] = 0.0
    rows[corrected, _U0] = 1.0
    return rows


@np.errstate(divide="ignore", invalid="ignore")
def _noisy(rows: np.ndarray, table: CoefficientTable, eta: float) -> np.ndarray:
    """The stochastic form of every row."""
    rows = rows.copy()
    (alpha, sigma), (alpha_end, sigma_end) = table.levels.begin.T, table.levels.end.T
    own = rows[:, _C]
    share = 1 - np.square(sigma_end * alpha / (sigma * alpha_end))  # of the noise at the end that may be fresh
    c = np.maximum(eta * sigma_end * np.sqrt(np.clip(np.nan_to_num(share), 0.0, 1.0)), own)
    kept = np.sqrt((sigma_end**2 - c**2) / (sigma_end**2 - own**2))
    kept = np.where(c > own, np.nan_to_num(kept), 1.0)
    toward = (1 - kept) * alpha_end  # weight of x0
    x_weight, m_weight = table.levels.clean.T
    rows[:, _UPDATE] *= kept[:, None]
    rows[:, _B0] += toward * m_weight
    rows[:, _C] = c
    of_x = toward * x_weight
    folded = of_x != 0  # x itself enters: through xc, with a = 1
    rows[np.ix_(folded, _CORRECTOR)] *= rows[folded, _A][:, None]
    rows[folded, _U0] += of_x[folded]
    rows[folded, _A] = 1.0
    return rows
