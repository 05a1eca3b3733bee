"""Multistep solvers that integrate a polynomial through the last derivatives or noises: linear multistep (LMS) and DEIS."""

from __future__ import annotations

from math import factorial

import numpy as np
from numpy.polynomial.polynomial import polyint, polyval

from .convert import (
    alpha_sigma,
    denoised_weights,
    denoised_weights_scaled,
    derivative_weights,
    half_log_snr,
    lagrange,
    model_input_scale,
    phi,
)
from .multistep import FEW_STEPS
from .table import CoefficientTable, build, row, schedule

LMS_ORDER = 4


@np.errstate(divide="ignore", invalid="ignore")
def lms(sigmas, timesteps, prediction_type: str, *, start: int = 0) -> CoefficientTable:
    """Linear multistep of order 4 on dx/dsigma = (x - x0)/sigma (k-diffusion's `sample_lms`; Adams-Bashforth, uneven steps).

    x' = x + sum_k w_k*d_k, where w_k is the integral, from sigma now to sigma after, of the polynomial that is 1 at the
    noise level of d_k and 0 at those of the others. What is stored is the derivative d. The fourth derivative enters
    through xc, which nothing else uses: xc = x + w_3*m3.

    Args:
        sigmas: [S + 1], noise levels with x = x0 + sigma*noise; the last one is where sampling ends.
        timesteps: [S].

    As in diffusers, the order counts from the schedule's first step: where sampling starts later, the terms whose
    derivatives do not exist are left out.
    """
    timesteps = schedule("timesteps", timesteps, start=start)
    sigmas = schedule("sigmas", sigmas, length=len(timesteps) + 1)
    scale = model_input_scale(sigmas)
    rows, returned = [], np.zeros((len(timesteps), 2))
    for i in range(start, len(timesteps)):
        s, n = sigmas[i], sigmas[i + 1]
        denoised_weights_scaled(prediction_type, s)  # refuses other prediction types
        p, q = derivative_weights(prediction_type, s)
        nodes = sigmas[max(i + 1 - LMS_ORDER, 0) : i + 1][::-1] - s
        weights = [polyval(n - s, polyint(basis)) for basis in lagrange(nodes)][: i - start + 1]
        b0, b1, b2, u5 = np.append(weights, np.zeros(LMS_ORDER - len(weights)))
        rows.append(row(p=p, q=q, u5=u5, a=1.0, b0=b0, b1=b1, b2=b2, s=scale[i + 1]))
        returned[i] = 1.0, -s  # x0 = x - sigma*d
    return build("lms", rows, timesteps, start=start, input_scale=scale[start], returned=returned)


@np.errstate(divide="ignore", invalid="ignore")
def deis(
    sigmas,
    timesteps,
    prediction_type: str,
    *,
    order: int = 2,
    flow: bool = False,
    lower_order_final: bool = True,
    start: int = 0,
) -> CoefficientTable:
    """DEIS (arXiv:2204.13902): the noise as a polynomial in log(rho), rho = sigma_t/alpha_t, is integrated over rho.

    x'/alpha' = x/alpha + sum_k m_k*w_k, where w_k is the integral over rho of the polynomial in log(rho) that is 1 where m_k
    was evaluated and 0 where the others were (Eqs. 14 and 15). With z = log(rho/rho_now), which ends at -h, the integral of
    z^j over rho is rho'*(-h)^(j + 1)*j!*phi_{j+1}(h). What is stored is the noise.

    Args:
        sigmas: [S + 1]; sigma_t/alpha_t, or sigma_t with `flow`.
        timesteps: [S].
        lower_order_final: fewer than 15 steps end with order 2, then 1.
    """
    if order not in (1, 2, 3):
        raise NotImplementedError(f"deis: order {order}; there are 1, 2, 3")
    timesteps = schedule("timesteps", timesteps, start=start)
    sigmas = schedule("sigmas", sigmas, length=len(timesteps) + 1)
    alphas, noises = alpha_sigma(sigmas, flow)
    lambdas = half_log_snr(sigmas, flow)
    steps = len(timesteps)
    few = lower_order_final and steps < FEW_STEPS
    rows = []
    for i in range(start, steps):
        alpha, sigma = alphas[i], noises[i]
        # flow_prediction is relative to the schedule's own sigma, whatever alpha is
        p, q = denoised_weights(prediction_type, alpha, sigmas[i] if prediction_type == "flow_prediction" else sigma)
        now = min(order, i - start + 1, steps - i if few else order)
        h = lambdas[i + 1] - lambdas[i]
        moments = [(-h) ** (j + 1) * factorial(j) * phi(j + 1, h) for j in range(now)]
        b = noises[i + 1] * (lagrange(lambdas[i] - lambdas[i - now + 1 : i + 1][::-1]) @ moments)
        b = np.append(b, np.zeros(3 - now))
        eps_x, eps_y = (0.0, 1.0) if prediction_type == "epsilon" else ((1 - alpha * p) / sigma, -alpha * q / sigma)
        now_x = alphas[i + 1] / alpha + b[0] * eps_x  # m0 as x and y: where alpha is small, x and its noise cancel
        rows.append(row(p=eps_x, q=eps_y, a=now_x, b1=b[1], b2=b[2], e=b[0] * eps_y))
    return build("deis", rows, timesteps, start=start)
