"""What the tests of coefficient tables have in common: random schedules, and checks of rows and of whole tables."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st

from sage_kernels.coefficients import COLUMNS

EVERY = settings(max_examples=60, deadline=None, derandomize=True, database=None)
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def check_row(table, i, **expected):
    """Row i has these coefficients; every other column has its neutral value."""
    neutral = {"u0": 1.0, "s": 1.0, "clip": np.inf}
    for name, value in zip(COLUMNS, table.rows[i]):
        assert value == pytest.approx(expected.get(name, neutral.get(name, 0.0)), abs=1e-14, rel=1e-14), name


# Schedules: strictly decreasing, h between 0.05 and 2, lambda below 4 or ending at sigma = 0. (Beyond that 1 - alphas_cumprod
# itself has lost digits, and the comparison would measure that.)
@st.composite
def schedules(draw, flow=False, min_steps=2):
    h = draw(st.lists(st.floats(0.05, 2.0), min_size=min_steps, max_size=17))
    lambdas = draw(st.floats(-4, -1)) + np.cumsum(h)
    lambdas = lambdas[: max(min_steps, np.searchsorted(lambdas, 4.0))]
    sigmas = 1 / (1 + np.exp(lambdas)) if flow else np.exp(-lambdas)
    return np.append(sigmas, 0.0) if draw(st.booleans()) else sigmas


def numbered(sigmas):
    return np.arange(len(sigmas) - 1)[::-1]


def same_rows(first, second):
    np.testing.assert_allclose(first.rows, second.rows, rtol=1e-10, atol=1e-12)


# A model that always knows x0: whatever the solver, x stays on alpha*x0 + sigma*noise and keeps its noise level.
MODEL_OUTPUTS = {"epsilon": (0, 1), "sample": (1, 0), "flow_prediction": (-1, 1)}  # weights of (x0, noise)


def check_kept(table, levels, prediction_type):
    """Run the table on a model that always knows x0: after every call, x is at the next of `levels` ([S + 1, 2]).

    Samples, and all that the solver keeps, are weights of (x0, noise); fresh noise joins the old by its variance.
    """
    x, last, history = levels[0], None, [None] * 3

    def total(*terms):
        return sum((k * value for k, value in terms if k != 0), np.zeros(2))

    for i in range(len(table)):
        k = dict(zip(COLUMNS, table.rows[i]))
        alpha, sigma = levels[i]
        v = np.array([-sigma, alpha]) / np.hypot(alpha, sigma)
        y = v if prediction_type == "v_prediction" else np.array(MODEL_OUTPUTS[prediction_type], dtype=float)
        m0 = k["p"] * x + k["q"] * y
        m1, m2, m3 = history
        xc = total((k["u0"], x), (k["u1"], last), (k["u2"], m0), (k["u3"], m1), (k["u4"], m2), (k["u5"], m3))
        x = total((k["a"], xc), (k["b0"], m0), (k["b1"], m1), (k["b2"], m2), (k["e"], y))
        x = np.array([x[0], np.copysign(np.hypot(x[1], k["c"]), x[1]) if k["c"] else x[1]])
        np.testing.assert_allclose(x, levels[i + 1], rtol=1e-8, atol=1e-8)
        last, history = xc, [m0, m1, m2]
