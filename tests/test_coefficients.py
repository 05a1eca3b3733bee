"""The coefficient tables by themselves: hand-computed rows, identities between solvers, exactness and order of accuracy."""

import pickle
from fractions import Fraction
from math import exp, factorial, log, sqrt

import numpy as np
import pytest
import torch
from coefficient_checks import EVERY, MODEL_OUTPUTS, PREDICTIONS, check_row, numbered, same_rows, schedules
from hypothesis import given
from hypothesis import strategies as st

from sage_kernels.coefficients import (
    COLUMNS,
    ddim,
    ddpm,
    dpmpp,
    euler,
    euler_ancestral,
    flow_euler,
    heun,
    lcm,
    unipc,
)
from sage_kernels.coefficients.convert import alpha_sigma, half_log_snr, phi
from sage_kernels.coefficients.table import build, row

# Hand-computed rows.  alphas_cumprod 0.64 -> (alpha, sigma) = (0.8, 0.6); 0.36 -> (0.6, 0.8).
ALPHAS_CUMPROD = np.array([0.64, 0.36])
VARIANCE = 0.36 / 0.64 * (1 - 0.36 / 0.64)  # (1-P)/(1-A)*(1-A/P)


def test_ddim_rows():
    table = ddim(ALPHAS_CUMPROD, 1.0, [1, 0], [0, -1], "epsilon")
    check_row(table, 0, p=1 / 0.6, q=-0.8 / 0.6, a=0.6 / 0.8, b0=0.8 - 0.6 * 0.6 / 0.8)
    check_row(table, 1, p=1 / 0.8, q=-0.6 / 0.8, a=0, b0=1)
    assert (table.history, table.corrector, table.stochastic, table.input_scale, table.solver) == (0, False, False, 1, "ddim")
    last = ddim(ALPHAS_CUMPROD, 0.64, [1, 0], [0, -1], "epsilon").rows[1]
    assert last[COLUMNS.index("a")] == 1 and last[COLUMNS.index("b0")] == 0  # final_alpha_cumprod = the last one: stay


def test_ddim_noise_is_ddpms_at_eta_1():
    table = ddim(ALPHAS_CUMPROD, 1.0, [1, 0], [0, -1], "v_prediction", eta=1.0)
    direction = sqrt(0.36 - VARIANCE)
    check_row(table, 0, p=0.6, q=-0.8, a=direction / 0.8, b0=0.8 - direction * 0.6 / 0.8, c=sqrt(VARIANCE))
    assert table.stochastic


def test_ddim_clipping_leaves_the_predicted_noise():
    wanted = {"epsilon": dict(a=0, e=0.6), "v_prediction": dict(a=0.6 * 0.8, e=0.6 * 0.6), "sample": dict(a=0.75, e=-0.45)}
    for prediction_type, weights in wanted.items():
        table = ddim(ALPHAS_CUMPROD, 1.0, [1, 0], [0, -1], prediction_type, clip=0.9)
        p, q = table.rows[0, :2]
        check_row(table, 0, p=p, q=q, clip=0.9, b0=0.8, **weights)


def test_ddpm_rows():
    table = ddpm(ALPHAS_CUMPROD, [1, 0], [0, -1], "sample")
    mean = dict(p=0, q=1, a=0.75 * 0.36 / 0.64, b0=0.8 * 0.4375 / 0.64)
    check_row(table, 0, **mean, c=sqrt(VARIANCE))
    check_row(table, 1, p=0, q=1, b0=1)  # no noise at t = 0
    log_form = ddpm(ALPHAS_CUMPROD, [1, 0], [0, -1], "sample", variance_type="fixed_small_log")
    np.testing.assert_array_equal(table.rows, log_form.rows)
    check_row(ddpm(ALPHAS_CUMPROD, [1, 0], [0, -1], "sample", variance_type="fixed_large"), 0, **mean, c=sqrt(0.4375))
    floor = ddpm(ALPHAS_CUMPROD, [1], [-1], "sample").rows[0, COLUMNS.index("c")]
    assert floor == pytest.approx(1e-10)  # the last step from t > 0 still draws: diffusers' variance floor of 1e-20


def test_lcm_rows():
    table = lcm(ALPHAS_CUMPROD, [1, 0], "sample", timestep_scaling=0.5)
    c_skip, c_out = 0.25 / 0.5, 0.5 / sqrt(0.5)
    check_row(table, 0, p=c_skip, q=c_out, b0=0.8, c=0.6)
    check_row(table, 1, p=1, q=0, b0=1)  # the boundary condition at t = 0
    clipped = lcm(ALPHAS_CUMPROD, [1, 0], "sample", timestep_scaling=0.5, clip=1.0)
    check_row(clipped, 0, p=0, q=1, a=0.8 * c_skip, b0=0.8 * c_out, c=0.6, clip=1)
    more = lcm(ALPHAS_CUMPROD, [1, 0], "sample", num_inference_steps=3)
    assert more.rows[1, COLUMNS.index("c")] == pytest.approx(0.6)  # row 1 is not step 2: it noises again


def test_euler_rows():
    table = euler([2.0, 1.0, 0.0], [7.5, 3.0], "epsilon")
    check_row(table, 0, p=1, q=-2, a=0.5, b0=0.5, s=1 / sqrt(2))
    check_row(table, 1, p=1, q=-1, a=0, b0=1)
    assert table.input_scale == pytest.approx(1 / sqrt(5)) and table.timesteps.tolist() == [7.5, 3.0]
    check_row(euler([2.0, 1.0], [7.5], "v_prediction"), 0, p=1 / 5, q=-2 / sqrt(5), a=0.5, b0=0.5, s=1 / sqrt(2))


def test_euler_ancestral_rows():
    table = euler_ancestral([2.0, 1.0, 0.0], [1, 0], "epsilon")
    check_row(table, 0, p=1, q=-2, a=0.25, b0=0.75, c=sqrt(0.75), s=1 / sqrt(2))
    check_row(table, 1, p=1, q=-1, b0=1)


def test_heun_rows():
    table = heun([2.0, 1.0, 1.0, 0.0], [2, 1, 1], "epsilon")
    check_row(table, 0, p=1, q=-2, a=0.5, b0=0.5, s=1 / sqrt(2))
    second = dict(u1=0.75, a=1, b1=0.25, s=1 / sqrt(2))
    check_row(table, 1, p=1, q=-1, u0=0, e=-0.5, **second)
    check_row(table, 2, p=1, q=-1, b0=1)
    clipped = heun([2.0, 1.0, 1.0, 0.0], [2, 1, 1], "sample", clip=0.9)
    check_row(clipped, 1, p=0, q=1, u0=-0.5, b0=0.5, clip=0.9, **second)
    velocity = heun([2.0, 1.0, 1.0, 0.0], [2, 1, 1], "v_prediction")
    check_row(velocity, 1, p=0.5, q=-sqrt(0.5), u0=-0.25, e=-0.5 * sqrt(0.5), **second)
    assert table.stage.tolist() == [1, 0, 0] and table.corrector and table.history == 1
    assert heun([2.0, 1.0, 1.0, 0.0], [2, 1, 1], "epsilon", start=1).stage.tolist() == [0, 1, 0]


def test_flow_euler_rows():
    table = flow_euler([1.0, 0.7, 0.0], [1000, 700])
    check_row(table, 0, p=0, q=1, a=1, b0=-0.3)
    check_row(table, 1, p=0, q=1, a=1, b0=-0.7)
    check_row(flow_euler([1.0, 0.7, 0.0], [1000, 700], stochastic=True), 0, p=1, q=-1, b0=0.3, c=0.7)


HALVING = [8.0, 4.0, 2.0, 1.0]  # h = log 2 in every step; the last one ends at alpha = sigma = 1/sqrt(2)
LAST = dict(p=0, q=1, a=sqrt(5) / 2 / sqrt(2))


def dpm(order, **options):
    return dpmpp(HALVING, [2, 1, 0], "sample", order=order, lower_order_final=False, final_sigmas_zero=False, **options)


def test_dpmpp_rows():
    alpha, h = 1 / sqrt(2), log(2)
    g0 = alpha / 2
    check_row(dpm(1), 2, **LAST, b0=g0)
    check_row(dpm(2), 2, **LAST, b0=1.5 * g0, b1=-0.5 * g0)
    g1 = alpha * (1 - 0.5 / h)
    check_row(dpm(2, solver_type="heun"), 2, **LAST, b0=g0 + g1, b1=-g1)
    g2 = -alpha * ((h - 0.5) / h**2 - 0.5)
    bend = (g1 + g2) / 2
    check_row(dpm(3), 2, **LAST, b0=g0 + g1 + bend, b1=-g1 - 2 * bend, b2=bend)
    assert [dpm(k).history for k in (1, 2, 3)] == [0, 1, 2]


def test_dpmpp_sde_rows():
    alpha, h = 1 / sqrt(2), log(2)
    g0, a, c = alpha * 0.75, LAST["a"] / 2, alpha * sqrt(0.75)
    check_row(dpm(1, sde=True), 2, p=0, q=1, a=a, b0=g0, c=c)
    check_row(dpm(2, sde=True), 2, p=0, q=1, a=a, b0=1.5 * g0, b1=-0.5 * g0, c=c)
    g1 = alpha * (1 - 0.75 / (2 * h))
    check_row(dpm(2, sde=True, solver_type="heun"), 2, p=0, q=1, a=a, b0=g0 + g1, b1=-g1, c=c)
    g2 = alpha * ((0.75 - 2 * h) / (2 * h) ** 2 - 0.5)
    bend = (g1 + g2) / 2
    check_row(dpm(3, sde=True), 2, p=0, q=1, a=a, b0=g0 + g1 + bend, b1=-g1 - 2 * bend, b2=bend, c=c)


def test_dpmpp_lowers_the_order_at_the_ends():
    def orders(**options):
        steps = options.pop("steps")
        sigmas = np.append(np.geomspace(10, 0.1, steps), 0.02)
        table = dpmpp(sigmas, np.arange(steps), "sample", order=3, final_sigmas_zero=False, **options)
        return "".join(str(1 + bool(r[COLUMNS.index("b1")]) + bool(r[COLUMNS.index("b2")])) for r in table.rows)

    assert orders(steps=6) == "123321"
    assert orders(steps=15) == "12" + 13 * "3"
    assert orders(steps=6, lower_order_final=False) == "123333"
    assert orders(steps=6, lower_order_final=False, euler_at_final=True) == "123331"
    assert orders(steps=7, start=2) == "1112321"  # two unused rows, then warm-up


def test_unipc_rows():
    table = unipc(HALVING, [2, 1, 0], "sample", order=1)
    alpha, sigma_step = 1 / sqrt(5), (2 / sqrt(5)) / (4 / sqrt(17))
    check_row(table, 0, p=0, q=1, a=(4 / sqrt(17)) / (8 / sqrt(65)), b0=0.5 / sqrt(17))
    # corrector of order 1: xc = sigma/sigma_L*L + alpha/2*m1 + alpha/4*(m0 - m1)
    corrector = dict(u0=0, u1=sigma_step, u2=alpha / 4, u3=alpha / 4)
    check_row(table, 2, **LAST, **corrector, b0=0.5 / sqrt(2))
    assert table.corrector and table.history == 1
    off = unipc(HALVING, [2, 1, 0], "sample", order=1, disable_corrector=[1])
    check_row(off, 2, **LAST, b0=0.5 / sqrt(2))
    assert off.rows[1, COLUMNS.index("u1")] != 0
    assert unipc(np.geomspace(9, 1, 9), np.arange(8), "sample", order=3).history == 3


@EVERY
@given(schedules(), st.sampled_from(PREDICTIONS))
def test_first_order_solvers_agree(sigmas, prediction_type):
    steps = numbered(sigmas)
    alphas_cumprod = (1 / (1 + sigmas**2))[::-1]  # timestep k of this schedule is sigmas[-1 - k]
    once = dpmpp(sigmas, steps, prediction_type, order=1)
    same_rows(once, ddim(alphas_cumprod, None, steps + 1, steps, prediction_type))
    same_rows(once, unipc(sigmas, steps, prediction_type, order=1, disable_corrector=range(len(steps))))
    sde = dpmpp(sigmas, steps, prediction_type, order=1, sde=True)
    same_rows(sde, ddim(alphas_cumprod, None, steps + 1, steps, prediction_type, eta=1.0))
    posterior = ddpm(alphas_cumprod, steps + 1, steps, prediction_type).rows
    np.testing.assert_allclose(sde.rows, posterior, rtol=1e-9, atol=2e-10)  # but for DDPM's variance floor

    scaled = euler(sigmas, steps, prediction_type)  # the same step for x/alpha
    alphas, _ = alpha_sigma(sigmas, flow=False)
    np.testing.assert_allclose(scaled.column("a") * alphas[1:] / alphas[:-1], once.column("a"), atol=1e-12)
    np.testing.assert_allclose(scaled.column("b0") * alphas[1:], once.column("b0"), atol=1e-12)


@EVERY
@given(schedules(flow=True))
def test_dpmpp1_for_flow_matching_is_flow_euler(sigmas):
    once = dpmpp(sigmas, numbered(sigmas), "flow_prediction", order=1, flow=True)
    flow = flow_euler(sigmas, numbered(sigmas))
    # both as weights of x and y:  a + b0*p and b0*q
    a, b0, p, q = (once.column(name) for name in ("a", "b0", "p", "q"))
    np.testing.assert_allclose(a + b0 * p, flow.column("a"), atol=1e-12)
    np.testing.assert_allclose(b0 * q, flow.column("b0"), atol=1e-12)


@EVERY
@given(schedules(min_steps=3), st.sampled_from(PREDICTIONS))
def test_unip2_with_bh2_is_dpmpp_2m(sigmas, prediction_type):
    sigmas = sigmas[sigmas > 0]
    steps = numbered(sigmas)
    options = dict(order=2, lower_order_final=False)
    predictor = unipc(sigmas, steps, prediction_type, disable_corrector=range(len(steps)), **options)
    same_rows(predictor, dpmpp(sigmas, steps, prediction_type, final_sigmas_zero=False, **options))


def check_exact(table, alphas, sigmas, prediction_type):
    """Apply each row to points of the line, written as weights of (x0, noise); the fresh noise is separate."""
    line = np.stack([alphas, sigmas], 1)  # [S + 1, 2]
    x0 = np.array([1.0, 0.0])
    for i in range(len(table)):
        k = dict(zip(COLUMNS, table.rows[i]))
        alpha, sigma = line[i]
        v = (-sigma, alpha) / np.hypot(alpha, sigma)
        y = v if prediction_type == "v_prediction" else np.array(MODEL_OUTPUTS[prediction_type], dtype=float)
        m0 = k["p"] * line[i] + k["q"] * y
        if (k["p"], k["q"]) != (0, 1):  # flow_euler stores the velocity
            np.testing.assert_allclose(m0, x0, atol=1e-9)
        xc = k["u0"] * line[i] + k["u1"] * line[i - 1] + k["u2"] * m0 + (k["u3"] + k["u4"] + k["u5"]) * x0
        x = k["a"] * xc + k["b0"] * m0 + (k["b1"] + k["b2"]) * x0 + k["e"] * y
        np.testing.assert_allclose([x[0], np.hypot(x[1], k["c"])], line[i + 1], rtol=1e-9, atol=1e-9)
        if k["c"] == 0:
            assert x[1] >= -1e-9


@EVERY
@given(schedules(), st.sampled_from(PREDICTIONS), st.integers(1, 3), st.booleans())
def test_a_constant_x0_is_kept_by_the_variance_preserving_solvers(sigmas, prediction_type, order, flag):
    steps = numbered(sigmas)
    alphas, noises = alpha_sigma(sigmas, flow=False)
    acp = (1 / (1 + sigmas**2))[::-1]
    ends = dict(final_sigmas_zero=bool(sigmas[-1] == 0), lower_order_final=flag)
    tables = [
        ddim(acp, None, steps + 1, steps, prediction_type, eta=0.3 * order),
        ddpm(acp, steps + 1, steps, prediction_type),
        unipc(sigmas, steps, prediction_type, order=order, bh="bh1" if flag else "bh2"),
    ]
    for solver_type in ("midpoint", "heun"):
        for sde in (False, True):
            tables.append(dpmpp(sigmas, steps, prediction_type, order=order, solver_type=solver_type, sde=sde, **ends))
    for table in tables:
        check_exact(table, alphas, noises, prediction_type)


@EVERY
@given(schedules(flow=True), st.integers(1, 3), st.booleans())
def test_a_constant_x0_is_kept_by_the_flow_solvers(sigmas, order, flag):
    steps = numbered(sigmas)
    for prediction_type in ("flow_prediction", "epsilon", "sample"):
        for f in (dpmpp, unipc):
            check_exact(f(sigmas, steps, prediction_type, order=order, flow=True), 1 - sigmas, sigmas, prediction_type)
    check_exact(flow_euler(sigmas, steps, stochastic=flag), 1 - sigmas, sigmas, "flow_prediction")


@EVERY
@given(schedules(), st.sampled_from(PREDICTIONS))
def test_a_constant_x0_is_kept_by_the_euler_family(sigmas, prediction_type):
    steps, ones = numbered(sigmas), np.ones(len(sigmas))
    for f in (euler, euler_ancestral):
        check_exact(f(sigmas, steps, prediction_type), ones, sigmas, prediction_type)
    doubled = np.concatenate([sigmas[:1], np.repeat(sigmas[1:-1], 2), sigmas[-1:]])
    table = heun(doubled, numbered(doubled), prediction_type)
    # the first stage ends at the level the second stage starts from; the second stage stays on it
    levels = np.concatenate([sigmas[:1], np.repeat(sigmas[1:-1], 2)[: len(table) - 1], sigmas[-1:]])
    check_exact(table, np.ones(len(levels)), levels, prediction_type)
    np.testing.assert_allclose(table.column("s")[:-1], 1 / np.sqrt(levels[1:-1] ** 2 + 1))


# Order of accuracy on Gaussian data of standard deviation KAPPA, where the trajectory is known:
# x(t) = sqrt(alpha^2*KAPPA^2 + sigma^2), and the denoiser gives alpha*KAPPA^2*x/(alpha^2*KAPPA^2 + sigma^2).
KAPPA, STEP = 0.6, 4


def local_error(solve, h, flow, corrector):
    """Error of row STEP with an exact past, for uneven steps of about h around the same lambda."""
    widths = h * np.array([1.0, 0.7, 1.3, 0.85, 1.15])
    lambdas = np.append(0, np.cumsum(widths))
    lambdas += -0.4 - lambdas[STEP]
    sigmas = 1 / (1 + np.exp(lambdas)) if flow else np.exp(-lambdas)
    alphas, noises = alpha_sigma(sigmas, flow)
    x = np.sqrt(alphas**2 * KAPPA**2 + noises**2)
    m = (alphas * KAPPA**2 / x)[STEP::-1]  # m0, m1, ...
    k = dict(zip(COLUMNS, solve(sigmas, np.arange(5), "sample", flow=flow, lower_order_final=False).rows[STEP]))
    if corrector:
        corrected = k["u1"] * x[STEP - 1] + k["u2"] * m[0] + k["u3"] * m[1] + k["u4"] * m[2] + k["u5"] * m[3]
        return abs(corrected - x[STEP])
    return abs(k["a"] * x[STEP] + k["b0"] * m[0] + k["b1"] * m[1] + k["b2"] * m[2] - x[STEP + 1])


def solve_dpmpp(order, solver_type):
    return lambda *a, **k: dpmpp(*a, order=order, solver_type=solver_type, final_sigmas_zero=False, **k)


def solve_unipc(order, bh):
    return lambda *a, **k: unipc(*a, order=order, bh=bh, **k)


ORDERS = [(solve_dpmpp(1, "midpoint"), False, 2)]
ORDERS += [(solve_dpmpp(2, kind), False, 3) for kind in ("midpoint", "heun")]
ORDERS += [(solve_dpmpp(3, "midpoint"), False, 3)]  # third order in name: see dpmpp's notes
ORDERS += [(solve_unipc(p, bh), False, p + 1) for p in (1, 2, 3) for bh in ("bh1", "bh2")]
ORDERS += [(solve_unipc(p, bh), True, p + 2) for p in (1, 2, 3) for bh in ("bh1", "bh2")]


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("solve, corrector, order", ORDERS)
def test_order_of_accuracy(solve, corrector, order, flow):
    coarse, fine = (local_error(solve, h, flow, corrector) for h in (0.02, 0.01))
    assert np.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def test_third_order_is_more_accurate_than_second():
    second, third = (local_error(solve_dpmpp(k, "heun"), 0.05, False, False) for k in (2, 3))
    assert third < second / 3


def test_phi_functions():
    for k in (1, 2, 3, 4):
        for z in (-9.0, -2.5, -1.0, -0.75, -0.01, -1e-9, 0.0, 0.4, 1.5):
            exact = sum(Fraction(z) ** j / factorial(j + k) for j in range(70))
            assert phi(k, z) == pytest.approx(float(exact), rel=1e-13)
    assert phi(1, -np.inf) == 0 and phi(2, -1.0) == pytest.approx(exp(-1))


def test_half_log_snr():
    np.testing.assert_allclose(half_log_snr(np.array([exp(2), 1.0, 0.0]), flow=False), [-2, 0, np.inf])
    np.testing.assert_allclose(half_log_snr(np.array([0.5, 0.2]), flow=True), [0, log(4)])


def test_equal_sigmas_leave_the_sample_alone():
    schedule = ([2, 1, 1], [1, 0], "sample")
    second = dpmpp(*schedule, solver_type="heun", final_sigmas_zero=False, lower_order_final=False)
    predictor = unipc(*schedule, lower_order_final=False, disable_corrector=[0])
    for table in (second, predictor):
        check_row(table, 1, p=0, q=1, a=1)


def test_table_container():
    table = unipc(np.geomspace(9, 1, 9), np.arange(8), "sample", order=3)
    assert len(table) == 8 and table.rows.shape == (8, len(COLUMNS)) and table.rows.dtype == np.float64
    assert not np.signbit(table.rows[table.rows == 0]).any()
    with pytest.raises(ValueError, match="read-only"):
        table.rows[0, 0] = 1
    with torch.inference_mode():
        tensor = table.tensor("cpu")
    assert tensor.dtype == torch.float32 and tensor.is_contiguous() and not tensor.is_inference()
    assert table.tensor(torch.device("cpu")) is tensor and table.tensor("meta") is table.tensor("meta")
    np.testing.assert_array_equal(tensor.numpy(), table.rows.astype(np.float32))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(table)).rows, table.rows)


def test_rows_before_start_are_zero():
    sigmas, steps = np.geomspace(9, 1, 9), np.arange(8)
    for f in (euler, euler_ancestral, heun, dpmpp, unipc):
        table = f(sigmas, steps, "sample", start=3)
        assert not table.rows[:3].any() and table.rows[3:, COLUMNS.index("u0")].any() and len(table) == 8
    assert euler(sigmas, steps, "sample", start=3).input_scale == pytest.approx(1 / sqrt(sigmas[3] ** 2 + 1))


SIGMAS, STEPS = [4.0, 2.0, 1.0], [1, 0]
REFUSED = [
    (NotImplementedError, "alpha_t = 0", lambda: ddim([0.5, 0.0], 1.0, [1], [0], "epsilon")),
    (NotImplementedError, "prediction_type 'x'; there are epsilon", lambda: ddpm(ALPHAS_CUMPROD, [1], [0], "x")),
    (NotImplementedError, "'flow_prediction'; there are epsilon", lambda: euler(SIGMAS, STEPS, "flow_prediction")),
    (NotImplementedError, "with clipping", lambda: ddim(ALPHAS_CUMPROD, 1, [1], [0], "flow_prediction", clip=1.0)),
    (NotImplementedError, "variance_type 'learned'", lambda: ddpm(ALPHAS_CUMPROD, [1], [0], "sample", variance_type="learned")),
    (NotImplementedError, "order 4; there are 1, 2, 3", lambda: dpmpp(SIGMAS, STEPS, "sample", order=4)),
    (NotImplementedError, "solver_type 'bh2'", lambda: dpmpp(SIGMAS, STEPS, "sample", solver_type="bh2")),
    (NotImplementedError, "order 4; there are 1, 2, 3", lambda: unipc(SIGMAS, STEPS, "sample", order=4)),
    (NotImplementedError, "solver_type 'bh3'", lambda: unipc(SIGMAS, STEPS, "sample", bh="bh3")),
    (NotImplementedError, "row 1 .* no finite coefficient", lambda: euler([2.0, 0.0, 0.0], STEPS, "epsilon")),
    (NotImplementedError, "row 0 .* coefficient c", lambda: euler_ancestral([1.0, 2.0, 0.0], STEPS, "epsilon")),
    (ValueError, "sigmas must have length 3, got shape \\(2,\\)", lambda: euler([2.0, 0.0], STEPS, "epsilon")),
    (ValueError, "timesteps must have one dimension", lambda: euler(SIGMAS, [STEPS], "epsilon")),
    (ValueError, "start must be one of the 2 steps, got 2", lambda: flow_euler(SIGMAS, STEPS, start=2)),
    (TypeError, "unknown columns \\['d'\\]", lambda: row(d=1.0)),
]


@pytest.mark.parametrize("error, message, call", REFUSED)
def test_refused(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_a_clip_that_is_not_a_number_is_refused():
    with pytest.raises(NotImplementedError, match="clip"):
        build("x", [row(clip=np.nan)], np.zeros(1))
