"""The coefficient tables of two-stage, single-step, Adams-type and distilled-model solvers: rows, identities and orders."""

from math import cos, log, pi, sqrt

import numpy as np
import pytest
from coefficient_checks import EVERY, PREDICTIONS, check_kept, check_row, numbered, schedules
from hypothesis import given
from hypothesis import strategies as st

from sage_kernels.coefficients import (
    COLUMNS,
    deis,
    dpmpp,
    dpmpp_singlestep,
    edm_dpmpp,
    edm_euler,
    euler,
    flow_euler,
    flow_euler_ancestral,
    flow_heun,
    kdpm2,
    kdpm2_ancestral,
    lms,
    scm,
    tcd,
)
from sage_kernels.coefficients.convert import alpha_sigma, lagrange

HALVING, L2 = [8.0, 4.0, 2.0, 1.0], log(2)  # h = log 2 in every step; the last one ends at alpha = sigma = 1/sqrt(2)


def test_lagrange_polynomials():
    nodes = np.array([0.3, -1.0, 2.0])
    np.testing.assert_allclose(lagrange(nodes) @ np.vander(nodes, increasing=True).T, np.eye(3), atol=1e-14)
    np.testing.assert_array_equal(lagrange(np.array([5.0])), [[1.0]])


def test_lms_rows_are_adams_bashforth():
    table = lms([4.0, 2.0, 1.0], [1, 0], "epsilon")
    check_row(table, 0, p=0, q=1, a=1, b0=-2, s=1 / sqrt(5))
    check_row(table, 1, p=0, q=1, a=1, b0=-1.25, b1=0.25, s=1 / sqrt(2))
    even = lms(np.arange(9.0, 0, -1), np.arange(8), "epsilon")
    fourth = dict(b0=-55 / 24, b1=59 / 24, b2=-37 / 24, u5=9 / 24)
    check_row(even, 5, p=0, q=1, a=1, s=1 / sqrt(10), **fourth)
    check_row(lms([2.0, 0.0], [0], "sample"), 0, p=0.5, q=-0.5, a=1, b0=-2)
    check_row(lms([2.0, 0.0], [0], "v_prediction"), 0, p=0.4, q=1 / sqrt(5), a=1, b0=-2)
    assert even.history == 3 and not even.corrector
    np.testing.assert_array_equal(even.returned[5], [1, -4])  # x0 = x - sigma*d
    late = lms(np.arange(9.0, 0, -1), np.arange(8), "epsilon", start=5)  # as in diffusers: order 4, without the derivatives
    check_row(late, 5, p=0, q=1, a=1, s=1 / sqrt(10), b0=fourth["b0"])


def test_deis_rows():
    last = dict(p=0, q=1, a=sqrt(5) / sqrt(2))
    check_row(deis(HALVING, [2, 1, 0], "epsilon", order=1), 2, **last, e=-1 / sqrt(2))
    second = deis(HALVING, [2, 1, 0], "epsilon", order=2, lower_order_final=False)
    check_row(second, 2, **last, e=-1 / sqrt(2) / L2, b1=(1 - L2) / L2 / sqrt(2))
    assert [deis(HALVING, [2, 1, 0], "sample", order=k, lower_order_final=False).history for k in (1, 2, 3)] == [0, 1, 2]
    first = deis(HALVING, [2, 1, 0], "sample", order=1)  # noise = (x - alpha*x0)/sigma, alpha = 1/sqrt(5), sigma = 2/sqrt(5)
    check_row(first, 2, p=sqrt(5) / 2, q=-0.5, a=sqrt(5 / 2) - sqrt(5 / 2) / 2, e=0.5 / sqrt(2))


def test_kdpm2_rows():
    levels, middles = [4.0, 1.0, 1.0, 0.0, 0.0, 0.0], [0.0, 2.0, 2.0, 0.0, 0.0, 0.0]
    table = kdpm2(levels, middles, [3, 2, 1], "epsilon")
    check_row(table, 0, p=1, q=-4, a=0.5, b0=0.5, s=1 / sqrt(5))
    check_row(table, 1, p=1, q=-2, u0=0, u1=1, a=1, e=-3, s=1 / sqrt(2))
    check_row(table, 2, p=1, q=-1, b0=1)
    velocity = kdpm2(levels, middles, [3, 2, 1], "v_prediction")
    check_row(velocity, 1, p=0.2, q=-2 / sqrt(5), u0=-1.2, u1=1, a=1, e=-3 / sqrt(5), s=1 / sqrt(2))
    assert table.stage.tolist() == [1, 0, 0] and table.corrector and table.history == 0


def test_kdpm2_ancestral_rows():
    up = sqrt(1 - 1 / 16)
    table = kdpm2_ancestral([4.0, 1, 1, 0, 0, 0], [1, 1, 0], [0.25, 0, 0], [up, 0, 0], [3, 2, 1], "epsilon")
    check_row(table, 0, p=1, q=-4, a=0.25, b0=0.75, s=1 / sqrt(2))
    check_row(table, 1, p=1, q=-1, u0=0, u1=1, a=1, e=-3.75, c=up, s=1 / sqrt(2))
    check_row(table, 2, p=1, q=-1, b0=1)
    assert table.stage.tolist() == [1, 0, 0] and table.stochastic


def test_singlestep_rows():
    table = dpmpp_singlestep(HALVING, [2, 1, 0], "sample", [1, 2, 3])
    restart = dict(p=0, q=1, u0=0, u1=1)
    check_row(table, 0, p=0, q=1, a=(4 / sqrt(17)) / (8 / sqrt(65)), b0=0.5 / sqrt(17))
    check_row(table, 1, **restart, a=(2 / sqrt(5)) / (8 / sqrt(65)), b0=0.75 / sqrt(5))
    alpha, g0 = 1 / sqrt(2), 0.875 / sqrt(2)
    g1, a = alpha * (1 - 0.875 / (3 * L2)), (1 / sqrt(2)) / (8 / sqrt(65))
    check_row(table, 2, **restart, a=a, b0=1.5 * g1, b2=g0 - 1.5 * g1)
    g2 = -alpha * ((3 * L2 - 0.875) / (9 * L2**2) - 0.5)
    late, early = (2 * g2 - g1 / 3) * 4.5, (2 / 3 * g1 - 2 * g2) * 9
    heun = dpmpp_singlestep(HALVING, [2, 1, 0], "sample", [1, 2, 3], solver_type="heun")
    check_row(heun, 2, **restart, a=a, b0=late, b1=early, b2=g0 - late - early)
    noisy = dpmpp_singlestep(HALVING, [2, 1, 0], "sample", [1, 2, 1], sde=True)
    sde = dict(a=(2 / sqrt(5)) / (8 / sqrt(65)) / 4, b0=15 / 16 / sqrt(5), c=2 / sqrt(5) * sqrt(15 / 16))
    check_row(noisy, 1, **restart, **sde)
    assert table.stage.tolist() == [1, 1, 0] and noisy.stage.tolist() == [1, 0, 0] and table.solver == "dpm++3s"
    late_start = dpmpp_singlestep(HALVING, [2, 1, 0], "sample", [1, 2, 3], start=1)
    assert late_start.stage.tolist() == [0, 1, 0] and late_start.column("u1").tolist() == [0, 0, 1]  # order 1, then 2


def test_edm_rows():
    table = edm_euler([2.0, 1.0, 0.0], [7.5, 3.0], "epsilon")
    check_row(table, 0, p=0.25 / 4.25, q=1 / sqrt(4.25), a=0.5, b0=0.5, s=1 / sqrt(1.25))
    check_row(table, 1, p=0.2, q=0.5 / sqrt(1.25), b0=1, s=2)
    assert edm_euler([2.0, 1.0], [0], "v_prediction").rows[0, 1] == pytest.approx(-1 / sqrt(4.25))
    assert table.input_scale == pytest.approx(1 / sqrt(4.25))


@EVERY
@given(schedules(min_steps=3), st.sampled_from(["epsilon", "v_prediction"]), st.booleans())
def test_edm_solvers_are_the_others_for_another_preconditioning(sigmas, prediction_type, sde):
    steps, zero = numbered(sigmas), bool(sigmas[-1] == 0)
    once = edm_dpmpp(sigmas, steps, prediction_type, order=1, final_sigmas_zero=zero)
    np.testing.assert_allclose(once.rows, edm_euler(sigmas, steps, prediction_type).rows, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(once.column("b0"), euler(sigmas, steps, "sample").column("b0"), rtol=1e-12, atol=1e-12)
    edm = edm_dpmpp(sigmas, steps, prediction_type, sde=sde, final_sigmas_zero=zero)
    vp, alphas = dpmpp(sigmas, steps, "sample", sde=sde, final_sigmas_zero=zero), alpha_sigma(sigmas, flow=False)[0]
    np.testing.assert_allclose(edm.column("a"), vp.column("a") * alphas[:-1] / alphas[1:], rtol=1e-10, atol=1e-12)
    for name in ("b0", "b1", "c"):
        np.testing.assert_allclose(edm.column(name), vp.column(name) / alphas[1:], rtol=1e-10, atol=1e-12)


def test_tcd_rows():
    table = tcd([0.81, 0.64, 0.36], [2, 1], [0, 0], "sample")
    check_row(table, 0, p=sqrt(0.19) / 0.8, q=0.9 - sqrt(0.19) * 0.75, b0=8 / 9, c=sqrt(1 - 64 / 81))
    check_row(table, 1, p=sqrt(0.19) / 0.6, q=0.9 - sqrt(0.19) * 4 / 3, b0=1)  # the last one ends where it went
    check_row(tcd([0.81, 0.64, 0.36], [2], [1], "epsilon", stochastic=False), 0, p=0.8 / 0.6, q=0.6 - 0.64 / 0.6, b0=1)
    more = tcd([0.81, 0.64, 0.36], [2, 1], [0, 0], "sample", num_inference_steps=5)
    assert more.rows[1, COLUMNS.index("c")] == 0  # from timestep 0 to timestep 0


def test_scm_rows():
    table = scm([pi / 2, pi / 6, 0.0])
    check_row(table, 0, p=0, q=-1, b0=cos(pi / 6), c=0.25)
    check_row(table, 1, p=cos(pi / 6), q=-0.5, b0=1)
    assert len(table) == 2 and table.timesteps.tolist() == [pi / 2, pi / 6]


def test_flow_heun_rows():
    table = flow_heun([1.0, 0.5, 0.5, 0.0], [3, 2, 1])
    check_row(table, 0, p=0, q=1, a=1, b0=-0.5)
    check_row(table, 1, p=0, q=1, u0=0, u1=1, a=1, b0=-0.25, b1=-0.25)
    check_row(table, 2, p=0, q=1, a=1, b0=-0.5)
    assert table.stage.tolist() == [1, 0, 0] and table.history == 1 and table.corrector


def test_flow_euler_ancestral_rows():
    table = flow_euler_ancestral([0.8, 0.4, 0.0], [3, 2, 1])
    for name, value in dict(p=1, q=-0.8, a=0.75 * 0.25, b0=0.75 * 0.75, c=sqrt(0.1375)).items():
        assert table.rows[0, COLUMNS.index(name)] == pytest.approx(value, abs=1e-11)
    check_row(table, 1, p=1, q=-0.4, b0=1)
    check_row(table, 2, p=0, q=1, a=1)  # as many timesteps as sigmas: nothing after the last
    plain = flow_euler_ancestral([0.8, 0.4, 0.0], [2, 1], eta=0.0)
    check_row(plain, 0, p=1, q=-0.8, a=0.5, b0=0.5)


def doubled(sigmas):
    return np.concatenate([sigmas[:1], np.repeat(sigmas[1:-1], 2), sigmas[-1:]])


@EVERY
@given(schedules(), st.sampled_from(PREDICTIONS), st.integers(1, 3), st.booleans())
def test_a_constant_x0_is_kept(sigmas, prediction_type, order, flag):
    steps, vp = numbered(sigmas), np.stack(alpha_sigma(sigmas, flow=False), 1)
    check_kept(lms(sigmas, steps, prediction_type), np.stack([np.ones(len(sigmas)), sigmas], 1), prediction_type)
    if sigmas[-1] > 0:
        check_kept(deis(sigmas, steps, prediction_type, order=order, lower_order_final=flag), vp, prediction_type)
    orders = np.resize(np.arange(order) + 1, len(steps))
    orders[-1] = 1
    for solver_type in ("midpoint", "heun"):
        check_kept(dpmpp_singlestep(sigmas, steps, prediction_type, orders, solver_type=solver_type), vp, prediction_type)
    once = dpmpp_singlestep(sigmas, steps, prediction_type, np.ones(len(steps)), sde=True)
    np.testing.assert_array_equal(once.rows, dpmpp(sigmas, steps, prediction_type, order=1, sde=True).rows)


@EVERY
@given(schedules(), st.sampled_from(PREDICTIONS), st.booleans())
def test_a_constant_x0_is_kept_by_the_two_stage_solvers(sigmas, prediction_type, noisy):
    sigmas = np.append(sigmas[sigmas > 0], 0.0)
    s, n = sigmas[:-1], sigmas[1:]
    levels, calls = np.concatenate([sigmas[:1], np.repeat(sigmas[1:], 2)]), 2 * len(s) - 1
    down = n**2 / s if noisy else n
    up, middle = np.sqrt(n**2 - down**2), np.sqrt(s * down)
    if noisy:
        arguments = [np.repeat(values, 2) for values in (middle, down, up)]
        table = kdpm2_ancestral(levels, *arguments, np.arange(calls), prediction_type)
    else:
        table = kdpm2(levels, np.append(0.0, np.repeat(middle, 2)), np.arange(calls), prediction_type)
    seen = np.append(np.ravel(np.stack([s, middle], 1))[:calls], 0.0)
    check_kept(table, np.stack([np.ones(len(seen)), seen], 1), prediction_type)


@EVERY
@given(schedules(flow=True), st.integers(1, 3))
def test_a_constant_x0_is_kept_by_the_flow_solvers(sigmas, order):
    steps, kind = numbered(sigmas), "flow_prediction"
    levels = np.stack([1 - sigmas, sigmas], 1)
    if sigmas[-1] > 0:
        check_kept(deis(sigmas, steps, kind, order=order, flow=True), levels, kind)
        np.testing.assert_allclose(
            check_first_order(deis(sigmas, steps, kind, order=1, flow=True)), check_first_order(flow_euler(sigmas, steps)), atol=1e-12
        )
    orders = np.resize(np.arange(order) + 1, len(steps))
    orders[-1] = 1
    check_kept(dpmpp_singlestep(sigmas, steps, kind, orders, flow=True), levels, kind)
    check_kept(flow_euler_ancestral(sigmas, steps), levels, kind)
    twice = doubled(sigmas)
    seen = np.concatenate([sigmas[:1], np.repeat(sigmas[1:-1], 2), sigmas[-1:]])
    check_kept(flow_heun(twice, numbered(twice)), np.stack([1 - seen, seen], 1), kind)


def check_first_order(table):
    """[S, 2]: the weights of x and y in x', for rows that read no history."""
    a, b0, e, p, q = (table.column(name) for name in ("a", "b0", "e", "p", "q"))
    return np.stack([a + b0 * p, b0 * q + e], 1)


# Order of accuracy on Gaussian data of standard deviation KAPPA, where the trajectory is known (see test_coefficients.py).
KAPPA = 0.6


def final_error(make, steps, flow):
    """Error at the end of a whole run over even steps in lambda, x0 predicted from x."""
    lambdas = np.linspace(-1.0, 1.2, steps + 1)
    sigmas = 1 / (1 + np.exp(lambdas)) if flow else np.exp(-lambdas)
    table, levels = make(sigmas)
    x = sqrt(levels[0][0] ** 2 * KAPPA**2 + levels[0][1] ** 2)
    last, history = np.nan, [np.nan] * 3
    for (alpha, sigma), rows in zip(levels, table.rows):
        k = dict(zip(COLUMNS, rows))
        x0 = alpha * KAPPA**2 * x / (alpha**2 * KAPPA**2 + sigma**2)
        noise = (x - alpha * x0) / sigma
        y = noise - x0 if flow else noise
        m0 = k["p"] * x + k["q"] * y
        terms = [(k["u0"], x), (k["u1"], last), (k["u2"], m0), *zip((k["u3"], k["u4"], k["u5"]), history)]
        xc = sum(w * value for w, value in terms if w != 0)
        terms = [(k["a"], xc), (k["b0"], m0), (k["b1"], history[0]), (k["b2"], history[1]), (k["e"], y)]
        x, last, history = sum(w * value for w, value in terms if w != 0), xc, [m0, *history[:2]]
    alpha, sigma = levels[len(table)]
    return abs(x - sqrt(alpha**2 * KAPPA**2 + sigma**2))


def singlestep(order, solver_type):
    def make(sigmas):
        orders = np.resize(np.arange(order) + 1, len(sigmas) - 1)
        table = dpmpp_singlestep(sigmas, numbered(sigmas), "epsilon", orders, solver_type=solver_type)
        return table, np.stack(alpha_sigma(sigmas, flow=False), 1)

    return make


def two_stage(sigmas):
    levels = np.concatenate([sigmas[:1], np.repeat(sigmas[1:], 2), sigmas[-1:]])
    middle = np.append(np.sqrt(sigmas[:-1] * sigmas[1:]), 0)
    table = kdpm2(levels, np.append(0.0, np.repeat(middle, 2)), np.arange(2 * len(sigmas) - 2), "epsilon")
    seen = np.append(np.ravel(np.stack([sigmas[:-1], middle[:-1]], 1)), sigmas[-1])
    return table, np.stack([np.ones(len(seen)), seen], 1)


def two_stage_flow(sigmas):
    twice = np.concatenate([sigmas[:1], np.repeat(sigmas[1:], 2)])
    table = flow_heun(twice, np.arange(len(twice) - 1))
    return table, np.stack([1 - twice, twice], 1)


@pytest.mark.parametrize(
    "make, flow, order",
    [
        (singlestep(1, "midpoint"), False, 1),
        (singlestep(2, "midpoint"), False, 2),
        (singlestep(2, "heun"), False, 2),
        (singlestep(3, "midpoint"), False, 3),
        (two_stage, False, 2),
        (two_stage_flow, True, 2),
    ],
    ids=["1s", "2s", "2s-heun", "3s", "kdpm2", "flow-heun"],
)
def test_order_of_whole_runs(make, flow, order):
    coarse, fine = (final_error(make, steps, flow) for steps in (48, 96))
    assert np.log2(coarse / fine) == pytest.approx(order, abs=0.2)


def local_error(h, row_of, kind):
    """Error of the fourth row with an exact past, over uneven steps of about h in lambda; `kind`: what is stored."""
    lambdas = np.append(0, np.cumsum(h * np.array([1.0, 0.7, 1.3, 0.85, 1.15])))
    sigmas = np.exp(-(lambdas - lambdas[3] - 0.4))
    alphas, noises = (np.ones(6), sigmas) if kind == "derivative" else alpha_sigma(sigmas, flow=False)
    x = np.sqrt(alphas**2 * KAPPA**2 + noises**2)
    stored = (noises / x)[3::-1]  # (x - alpha*x0)/sigma, at m0, m1, m2, m3
    k = dict(zip(COLUMNS, row_of(sigmas, np.arange(5))))
    past = (k["e"] + k["b0"]) * stored[0] + k["b1"] * stored[1] + k["b2"] * stored[2] + k["a"] * k["u5"] * stored[3]
    return abs(k["a"] * x[3] + past - x[4])


@pytest.mark.parametrize(
    "row_of, kind, order",
    [(lambda s, t: lms(s, t, "epsilon").rows[3], "derivative", 5)]
    + [
        (lambda s, t, p=p: deis(s, t, "epsilon", order=p, lower_order_final=False).rows[3], "noise", p + 1)
        for p in (1, 2, 3)
    ],
    ids=["lms", "deis-1", "deis-2", "deis-3"],
)
def test_local_order(row_of, kind, order):
    coarse, fine = (local_error(h, row_of, kind) for h in (0.04, 0.02))
    assert np.log2(coarse / fine) == pytest.approx(order, abs=0.25)


SIGMAS, STEPS = [4.0, 2.0, 1.0], [1, 0]
REFUSED = [
    (NotImplementedError, "order 4; there are 1, 2, 3", lambda: deis(SIGMAS, STEPS, "sample", order=4)),
    (NotImplementedError, "order 3 with noise", lambda: edm_dpmpp(SIGMAS, STEPS, "epsilon", order=3, sde=True)),
    (NotImplementedError, "prediction_type 'sample'; there are epsilon, v", lambda: edm_euler(SIGMAS, STEPS, "sample")),
    (NotImplementedError, "prediction_type 'x'; there are epsilon", lambda: lms(SIGMAS, STEPS, "x")),
    (NotImplementedError, "prediction_type 'x'; there are epsilon", lambda: kdpm2(SIGMAS, SIGMAS, STEPS, "x")),
    (NotImplementedError, "solver_type 'bh2'", lambda: dpmpp_singlestep(SIGMAS, STEPS, "sample", [1, 2], solver_type="bh2")),
    (NotImplementedError, "row 1 .* no finite coefficient", lambda: lms([4.0, 4.0, 1.0], STEPS, "epsilon")),
    (NotImplementedError, "row 1 .* no finite coefficient", lambda: deis([4.0, 4.0, 1.0], STEPS, "epsilon", lower_order_final=False)),
    (ValueError, "orders must have length 2, got shape \\(1,\\)", lambda: dpmpp_singlestep(SIGMAS, STEPS, "sample", [1])),
    (ValueError, "start must be one of the 2 steps, got 2", lambda: scm([1.0, 0.5, 0.0], start=2)),
]


@pytest.mark.parametrize("error, message, call", REFUSED)
def test_refused(error, message, call):
    with pytest.raises(error, match=message):
        call()
