"""The coefficient rows of members that part: the noise level is kept, DDIM's and the ancestral step are among them."""

import dataclasses

import numpy as np
import pytest
from coefficient_checks import check_kept

from sage import SageScheduler
from sage.solvers import SOLVERS, table_for
from sage_kernels.coefficients import COLUMNS, PARTED, PARTING, branch_rows

STEPS = 6
WITHOUT = ("deis", "lms", "tcd")  # what they store is no denoised sample
OWN_STEP = ("euler-a", "dpm++2m-sde", "ddpm", "kdpm2-a", "lcm", "flow-lcm")  # stochastic themselves


def table_of(solver, steps=STEPS, **overrides):
    scheduler = SageScheduler.from_config({}, solver=solver, **overrides)
    scheduler.set_timesteps(steps)
    return table_for(scheduler)


def column(rows, name):
    return rows[:, COLUMNS.index(name)]


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name not in (*WITHOUT, *OWN_STEP)])
def test_every_kind_of_row_keeps_the_noise_level(solver):
    """With a model that always knows x0, whatever the strength, and whether every step parts or only some."""
    prediction = "flow_prediction" if solver.startswith("flow") else "epsilon"
    table = table_of(solver, **({} if prediction == "flow_prediction" else dict(prediction_type="epsilon")))
    calls = np.arange(len(table))
    whole = table.stage == 0  # groups part after whole steps
    for eta in (0.0, 0.4, 1.0):
        rows = branch_rows(table, eta).reshape(4, len(table), -1)
        assert np.array_equal(rows[0], table.rows) and np.allclose(rows[PARTING][whole], table.rows[whole]) == (eta == 0)
        for kinds in ([PARTING + PARTED], [PARTING, PARTED], [0, PARTING, PARTED]):
            parting = np.where(whole, np.resize(kinds, len(table)) & PARTING, 0)
            parted = np.where(np.append(False, whole[:-1]), np.resize(kinds, len(table)) & PARTED, 0)
            check_kept(dataclasses.replace(table, rows=rows[parting + parted, calls]), _levels(table), prediction)


def _levels(table):
    """[S + 1, 2]: where every call begins, and the last ends; KDPM2's first stages end at levels of their own."""
    ends = table.levels.end.copy()
    if table.solver == "kdpm2":
        first = table.stage != 0
        ends[first, 1] = (column(table.rows, "a") * table.levels.begin[:, 1])[first]
    return np.concatenate([table.levels.begin[:1], ends])


def test_ddims_own_eta_and_eulers_ancestral_step_are_such_rows():
    scheduler = SageScheduler.from_config({}, solver="ddim")
    scheduler.set_timesteps(STEPS)
    for eta in (0.3, 1.0):
        rows = branch_rows(table_for(scheduler), eta)
        np.testing.assert_allclose(rows[STEPS : 2 * STEPS], table_for(scheduler, eta=eta).rows, rtol=1e-9, atol=1e-12)
    rows = branch_rows(table_of("euler"), 1.0)[STEPS : 2 * STEPS]
    np.testing.assert_allclose(rows, table_of("euler-a", timestep_spacing="linspace").rows, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", ["flow-euler", "flow-heun"])
def test_flow_matching_has_its_own_signal(solver):
    """α = 1 − σ. A first step at strength 1 comes from pure noise and keeps none of it: x' = (1 − n)·x0 + n·noise, x0 = x − s·v."""
    table = table_of(solver)
    last = int((table.stage == 0).argmax())  # of the first step
    row = dict(zip(COLUMNS, branch_rows(table, 1.0)[len(table) + last]))
    s, n = (1.0 if last == 0 else table.levels.end[0, 1]), table.levels.end[last, 1]
    assert table.levels.begin[last].tolist() == [0.0, 1.0] and row["c"] == pytest.approx(n)
    weights = row["a"] * row["u0"], row["a"] * row["u1"], row["b0"] + row["e"], row["b1"]  # of x, L, v and the stage before's v
    np.testing.assert_allclose(weights, (1 - n, 0, -(1 - n) * s, 0), atol=1e-12)


def test_unipc_does_not_correct_a_sample_that_got_noise():
    rows = branch_rows(table_of("unipc"), 0.5).reshape(4, STEPS, -1)
    for kind in (PARTED, PARTING + PARTED):
        assert (column(rows[kind], "u0") == 1).all() and not any(column(rows[kind], f"u{k}").any() for k in range(1, 6))
    assert column(rows[0], "u1")[1:].all() and column(rows[PARTING], "u1")[1:].all()


def test_a_stochastic_solver_keeps_its_own_step():
    for solver in OWN_STEP:
        table = table_of(solver)
        whole = np.flatnonzero(table.stage == 0)
        for eta in (0.5, 1.0):  # diffusers' schedules are float32
            np.testing.assert_allclose(branch_rows(table, eta)[len(table) + whole], table.rows[whole], rtol=1e-6, atol=1e-6)
    scheduler = SageScheduler.from_config({}, solver="ddim")
    scheduler.set_timesteps(STEPS)
    weaker = branch_rows(table_for(scheduler, eta=0.2), 0.8)[STEPS : 2 * STEPS]
    np.testing.assert_allclose(weaker, table_for(scheduler, eta=0.8).rows, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", WITHOUT)
def test_solvers_that_store_no_denoised_sample_have_none(solver):
    with pytest.raises(NotImplementedError, match=f"{solver}: what it stores is no denoised sample"):
        branch_rows(table_of(solver), 0.5)
