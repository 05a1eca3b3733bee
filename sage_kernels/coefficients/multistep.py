"""DPM-Solver++ (arXiv:2211.01095): multistep solvers for the denoised sample, deterministic and stochastic."""

from __future__ import annotations

import numpy as np

from .convert import alpha_sigma, denoised_weights, half_log_snr, phi
from .table import CoefficientTable, build, row, schedule

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
    if order not in (1, 2, 3):
        raise NotImplementedError(f"dpmpp: order {order}; there are 1, 2, 3")
    if solver_type not in ("midpoint", "heun"):
        raise NotImplementedError(f"dpmpp: solver_type {solver_type!r}; there are midpoint, heun")
    timesteps = schedule("timesteps", timesteps, start=start)
    sigmas = schedule("sigmas", sigmas, length=len(timesteps) + 1)
    alphas, noises = alpha_sigma(sigmas, flow)
    lambdas = half_log_snr(sigmas, flow)
    steps = len(timesteps)
    few = lower_order_final and steps < FEW_STEPS
    rows = []
    for i in range(start, steps):
        # flow_prediction is relative to the schedule's own sigma, whatever alpha is
        noise = sigmas[i] if prediction_type == "flow_prediction" else noises[i]
        p, q = denoised_weights(prediction_type, alphas[i], noise)
        last = i == steps - 1 and (euler_at_final or few or final_sigmas_zero)
        if order == 1 or i - start < 1 or last:
            now = 1
        elif order == 2 or i - start < 2 or (i == steps - 2 and few):
            now = 2
        else:
            now = 3
        a, b, c = _step(now, alphas[i + 1], noises[i], noises[i + 1], np.diff(lambdas[: i + 2])[::-1], sde, solver_type)
        rows.append(row(p=p, q=q, a=a, b0=b[0], b1=b[1], b2=b[2], c=c))
    name = "dpm++" + ("1" if order == 1 else f"{order}m") + ("-sde" if sde else "")
    return build(name, rows, timesteps, start=start)


def _step(order: int, alpha: float, sigma_now: float, sigma: float, widths: np.ndarray, sde: bool, solver_type: str):
    """(a, (b0, b1, b2), c) of x' = a*x + b0*m0 + b1*m1 + b2*m2 + c*noise, to (alpha, sigma) over h = widths[0].

    x' = a*x + g0*D0 + g1*D1 + g2*D2 + c*noise, where D0 = m0, and D1, D2 stand for h and h^2/2 times the first and second
    derivative of x0 in lambda: divided differences of m0, m1, m2, which are widths[1], widths[2] apart.
    """
    h = widths[0]
    z = -2 * h if sde else -h
    a = sigma / sigma_now * (np.exp(-h) if sde else 1.0)
    c = sigma * np.sqrt(-np.expm1(z)) if sde else 0.0
    g0 = -alpha * np.expm1(z)  # Alg. 2: -alpha*(e^-h - 1)
    if order == 1:
        return a, (g0, 0.0, 0.0), c
    h0 = widths[1]
    if order == 2:
        g1 = g0 / 2 if solver_type == "midpoint" else -alpha * z * phi(2, z)
        slope = g1 * h / h0  # D1 = (m0 - m1)*h/h0
        return a, (g0 + slope, -slope, 0.0), c
    h1 = widths[2]
    g1 = -alpha * z * phi(2, z)
    # As in diffusers. The stochastic form has + 1/2 there, which does not vanish with h as the other does.
    g2 = -alpha * (phi(2, z) + (0.5 if sde else -0.5))
    # D1 = d0 + (d0 - d1)*h0/(h0 + h1), D2 = (d0 - d1)*h/(h0 + h1), with d0 = (m0 - m1)*h/h0, d1 = (m1 - m2)*h/h1
    bend = (g1 * h0 + g2 * h) / (h0 + h1)
    d0, d1 = (g1 + bend) * h / h0, -bend * h / h1
    return a, (g0 + d0, d1 - d0, -d1), c
