"""DPM-Solver++ (arXiv:2211.01095): multistep solvers for the denoised sample, deterministic and stochastic."""

from __future__ import annotations

import numpy as np

from .convert import (
    alpha_sigma,
    denoised_weights,
    denoised_weights_edm,
    half_log_snr,
    model_input_scale,
    phi,
)
from .table import CoefficientTable, build, levels, row, schedule

FEW_STEPS = 15  # below this many steps, lower_order_final lowers the order of the last two


@np.errstate(divide="ignore", invalid="ignore")
def dpmpp(
    sigmas,
    timesteps,
    prediction_type: str,
    *,
    order: int = 2,
    sde: bool = False,
    solver_type: str = "midpoint",
    flow: bool = False,
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    final_sigmas_zero: bool = True,
    start: int = 0,
) -> CoefficientTable:
    """DPM-Solver++ of order 1 (which is DDIM), 2 (2M, Alg. 2) or 3 (3M), and SDE-DPM-Solver++ of the same orders.

    Args:
        sigmas: [S + 1]; sigma_t/alpha_t, or sigma_t with `flow`.
        timesteps: [S].
        sde: add fresh noise in every step.
        solver_type: "midpoint" or "heun", two second-order forms; order 3 has one form only.
        lower_order_final: fewer than 15 steps end with order 2, then 1.
        euler_at_final, final_sigmas_zero: each makes the last step first order.

    Order 3 is diffusers' (and the authors' code's): it takes D2 at half the size that a third-order method needs, so its
    local error is O(h^3) like order 2's, several times smaller.
    """
    timesteps = schedule("timesteps", timesteps, start=start)
    sigmas = schedule("sigmas", sigmas, length=len(timesteps) + 1)
    alphas, noises = alpha_sigma(sigmas, flow)
    lambdas = half_log_snr(sigmas, flow)
    last_first = euler_at_final or final_sigmas_zero
    rows = []
    for i, now in _orders(order, len(timesteps), start, lower_order_final, last_first):
        # flow_prediction is relative to the schedule's own sigma, whatever alpha is
        noise = sigmas[i] if prediction_type == "flow_prediction" else noises[i]
        p, q = denoised_weights(prediction_type, alphas[i], noise)
        a, b, c = _step(now, alphas[i + 1], noises[i], noises[i + 1], np.diff(lambdas[: i + 2])[::-1], sde, solver_type)
        rows.append(row(p=p, q=q, a=a, b0=b[0], b1=b[1], b2=b[2], c=c))
    return build(_name("dpm++", order, sde), rows, timesteps, start=start, levels=levels(alphas, noises))


@np.errstate(divide="ignore", invalid="ignore")
def edm_dpmpp(
    sigmas,
    timesteps,
    prediction_type: str,
    *,
    sigma_data: float = 0.5,
    order: int = 2,
    sde: bool = False,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    final_sigmas_zero: bool = True,
    start: int = 0,
) -> CoefficientTable:
    """DPM-Solver++ as in `dpmpp`, on x = x0 + sigma*noise, for a model preconditioned as in EDM (arXiv:2206.00364, Eq. 7).

    Args:
        sigmas: [S + 1], noise levels.
        sigma_data: standard deviation of the data; the model sees x/sqrt(sigma^2 + sigma_data^2).
    """
    if order == 3 and sde:
        raise NotImplementedError("edm_dpmpp: order 3 with noise, which diffusers has no formula for")
    timesteps = schedule("timesteps", timesteps, start=start)
    sigmas = schedule("sigmas", sigmas, length=len(timesteps) + 1)
    lambdas, scale = -np.log(sigmas), model_input_scale(sigmas, sigma_data)
    last_first = euler_at_final or final_sigmas_zero
    rows = []
    for i, now in _orders(order, len(timesteps), start, lower_order_final, last_first):
        p, q = denoised_weights_edm(prediction_type, sigmas[i], sigma_data)
        a, b, c = _step(now, 1.0, sigmas[i], sigmas[i + 1], np.diff(lambdas[: i + 2])[::-1], sde, solver_type)
        rows.append(row(p=p, q=q, a=a, b0=b[0], b1=b[1], b2=b[2], c=c, s=scale[i + 1]))
    name = _name("edm-dpm++", order, sde)
    return build(name, rows, timesteps, start=start, input_scale=scale[start], levels=levels(1.0, sigmas))


def _name(family: str, order: int, sde: bool) -> str:
    return family + ("1" if order == 1 else f"{order}m") + ("-sde" if sde else "")


def _orders(order: int, steps: int, start: int, lower_order_final: bool, last_first: bool) -> list[tuple[int, int]]:
    """(step, its order) from `start` on: warm-up, and the lower orders towards the end; `last_first`: the last is 1."""
    if order not in (1, 2, 3):
        raise NotImplementedError(f"dpmpp: order {order}; there are 1, 2, 3")
    few = lower_order_final and steps < FEW_STEPS
    limits = [min(order, i - start + 1, steps - i if few else order) for i in range(start, steps)]
    if last_first:
        limits[-1] = 1
    return list(enumerate(limits, start))


def _step(order: int, alpha: float, sigma_now: float, sigma: float, widths: np.ndarray, sde: bool, solver_type: str):
    """(a, (b0, b1, b2), c) of x' = a*x + b0*m0 + b1*m1 + b2*m2 + c*noise, to (alpha, sigma) over h = widths[0].

    x' = a*x + g0*D0 + g1*D1 + g2*D2 + c*noise, where D0 = m0, and D1, D2 stand for h and h^2/2 times the first and second
    derivative of x0 in lambda: divided differences of m0, m1, m2, which are widths[1], widths[2] apart.
    """
    if solver_type not in ("midpoint", "heun"):
        raise NotImplementedError(f"dpmpp: solver_type {solver_type!r}; there are midpoint, heun")
    h = widths[0]
    a, g0, g1, g2, c = gains(alpha, sigma_now, sigma, h, sde)
    if order == 1:
        return a, (g0, 0.0, 0.0), c
    h0 = widths[1]
    if order == 2:
        slope = (g0 / 2 if solver_type == "midpoint" else g1) * h / h0  # D1 = (m0 - m1)*h/h0
        return a, (g0 + slope, -slope, 0.0), c
    h1 = widths[2]
    # D1 = d0 + (d0 - d1)*h0/(h0 + h1), D2 = (d0 - d1)*h/(h0 + h1), with d0 = (m0 - m1)*h/h0, d1 = (m1 - m2)*h/h1
    bend = (g1 * h0 + g2 * h) / (h0 + h1)
    d0, d1 = (g1 + bend) * h / h0, -bend * h / h1
    return a, (g0 + d0, d1 - d0, -d1), c


def gains(alpha: float, sigma_from: float, sigma: float, h: float, sde: bool) -> tuple[float, float, float, float, float]:
    """(a, g0, g1, g2, c): weights of the sample, of x0 and its differences, and of noise, over h to (alpha, sigma).

    g2 is diffusers'; the stochastic form has + 1/2 in it, which does not vanish with h as the other does.
    """
    z = -2 * h if sde else -h
    a = sigma / sigma_from * (np.exp(-h) if sde else 1.0)
    c = sigma * np.sqrt(-np.expm1(z)) if sde else 0.0
    g0 = -alpha * np.expm1(z)  # Alg. 2: -alpha*(e^-h - 1)
    return a, g0, -alpha * z * phi(2, z), -alpha * (phi(2, z) + (0.5 if sde else -0.5)), c
