"""DPM-Solver++ (arXiv:2211.01095) as a single-step method: groups of one to three calls, each from the same sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .convert import alpha_sigma, denoised_weights, half_log_snr
from .multistep import gains
from .table import CoefficientTable, build, levels, row, schedule


@np.errstate(divide="ignore", invalid="ignore")
def dpmpp_singlestep(
    sigmas,
    timesteps,
    prediction_type: str,
    orders: Sequence[int],
    *,
    sde: bool = False,
    solver_type: str = "midpoint",
    flow: bool = False,
    start: int = 0,
) -> CoefficientTable:
    """DPM-Solver++(2S) and (3S) (arXiv:2211.01095, Alg. 1; arXiv:2206.00927, Alg. 2), and their stochastic forms.

    A call of order k goes from the sample of k - 1 calls ago, which is kept as L, to the next noise level, with the k
    outputs since. A group ends before the next call of order 1; `stage` is 1 inside a group.

    Args:
        sigmas: [S + 1]; sigma_t/alpha_t, or sigma_t with `flow`.
        timesteps: [S].
        orders: [S], for example 1 2 1 2 ... 1; calls for which there are too few outputs since `start` have a lower order.
        sde: add fresh noise in every call.
        solver_type: "midpoint" or "heun".
    """
    if solver_type not in ("midpoint", "heun"):
        raise NotImplementedError(f"dpmpp_singlestep: solver_type {solver_type!r}; there are midpoint, heun")
    timesteps = schedule("timesteps", timesteps, start=start)
    sigmas = schedule("sigmas", sigmas, length=len(timesteps) + 1)
    orders = schedule("orders", orders, length=len(timesteps)).astype(int)
    now = np.minimum(orders, np.arange(len(timesteps)) - start + 1)
    alphas, noises = alpha_sigma(sigmas, flow)
    lambdas = half_log_snr(sigmas, flow)
    rows = []
    for i in range(start, len(timesteps)):
        # flow_prediction is relative to the schedule's own sigma, whatever alpha is
        p, q = denoised_weights(prediction_type, alphas[i], sigmas[i] if prediction_type == "flow_prediction" else noises[i])
        first = i + 1 - now[i]  # the call that the group began with
        h = lambdas[i + 1] - lambdas[first]
        nodes = lambdas[first + 1 : i + 1] - lambdas[first]
        a, b, c = _step(alphas[i + 1], noises[first], noises[i + 1], h, nodes, sde, solver_type)
        restart = {} if now[i] == 1 else dict(u0=0.0, u1=1.0)
        rows.append(row(p=p, q=q, a=a, b0=b[0], b1=b[1], b2=b[2], c=c, **restart))
    stage = np.append(now[1:] > 1, False).astype(np.int64)
    stage[:start] = 0
    name = f"dpm++{orders.max()}s" + ("-sde" if sde else "")
    begin = np.maximum(np.arange(len(timesteps)) + 1 - now, 0)
    return build(name, rows, timesteps, start=start, stage=stage, levels=levels(alphas, noises, begin=begin))


def _step(alpha: float, sigma_first: float, sigma: float, h: float, nodes: np.ndarray, sde: bool, solver_type: str):
    """(a, (b0, b1, b2), c) of x' = a*L + b0*m0 + b1*m1 + b2*m2 + c*noise, over h from where the oldest m was evaluated.

    x' = a*L + g0*D0 + g1*D1 + g2*D2 + c*noise, where D0 is the oldest m, and D1, D2 stand for h times the first and h^2 times
    the second derivative of x0 in lambda: divided differences of the m, which are `nodes` after the oldest.
    """
    a, g0, g1, g2, c = gains(alpha, sigma_first, sigma, h, sde)
    if len(nodes) == 0:
        return a, (g0, 0.0, 0.0), c
    if len(nodes) == 1:
        slope = (g0 / 2 if solver_type == "midpoint" else g1) * h / nodes[0]  # D1 = (m0 - m1)*h/node
        return a, (slope, g0 - slope, 0.0), c
    r1, r0 = nodes / h
    if solver_type == "midpoint":  # D1 = (m0 - m2)/r0, no D2
        return a, (g1 / r0, 0.0, g0 - g1 / r0), c
    # d1 = (m1 - m2)/r1, d0 = (m0 - m2)/r0, D1 = (r0*d1 - r1*d0)/(r0 - r1), D2 = 2*(d0 - d1)/(r0 - r1)
    late = (2 * g2 - r1 * g1) / (r0 - r1) / r0
    early = (r0 * g1 - 2 * g2) / (r0 - r1) / r1
    return a, (late, early, g0 - late - early), c
