"""One-step solvers on a schedule of sigmas: Euler, Euler ancestral, and Euler in EDM's preconditioning."""

from __future__ import annotations

import numpy as np

from .convert import denoised_weights_edm, denoised_weights_scaled, model_input_scale
from .table import CoefficientTable, build, levels, row, schedule


@np.errstate(divide="ignore", invalid="ignore")
def euler(sigmas, timesteps, prediction_type: str, *, start: int = 0) -> CoefficientTable:
    """Euler's method on dx/dsigma = (x - x0)/sigma (arXiv:2206.00364, Alg. 1 without its second-order lines).

    Args:
        sigmas: [S + 1], noise levels with x = x0 + sigma*noise; the last one is where sampling ends.
        timesteps: [S].
    """
    timesteps = schedule("timesteps", timesteps, start=start)
    sigmas = schedule("sigmas", sigmas, length=len(timesteps) + 1)
    scale = model_input_scale(sigmas)
    rows = []
    for i in range(start, len(timesteps)):
        s, n = sigmas[i], sigmas[i + 1]
        p, q = denoised_weights_scaled(prediction_type, s)
        rows.append(row(p=p, q=q, a=n / s, b0=1 - n / s, s=scale[i + 1]))  # x + (n - s)*(x - x0)/s
    return build("euler", rows, timesteps, start=start, input_scale=scale[start], levels=levels(1.0, sigmas))


@np.errstate(divide="ignore", invalid="ignore")
def euler_ancestral(sigmas, timesteps, prediction_type: str, *, start: int = 0) -> CoefficientTable:
    """Ancestral sampling with Euler steps (k-diffusion's `sample_euler_ancestral`).

    Euler down to sigma_down, then noise of sigma_up, with sigma_down^2 + sigma_up^2 = sigma_next^2 and sigma_up^2 the
    variance of DDPM's posterior (arXiv:2006.11239, Eq. 7) on this schedule.
    """
    timesteps = schedule("timesteps", timesteps, start=start)
    sigmas = schedule("sigmas", sigmas, length=len(timesteps) + 1)
    scale = model_input_scale(sigmas)
    rows = []
    for i in range(start, len(timesteps)):
        s, n = sigmas[i], sigmas[i + 1]
        p, q = denoised_weights_scaled(prediction_type, s)
        up = n * np.sqrt((s - n) * (s + n)) / s
        down = n**2 / s  # sqrt(n^2 - up^2)
        rows.append(row(p=p, q=q, a=down / s, b0=1 - down / s, c=up, s=scale[i + 1]))
    return build("euler-a", rows, timesteps, start=start, input_scale=scale[start], levels=levels(1.0, sigmas))


@np.errstate(divide="ignore", invalid="ignore")
def edm_euler(sigmas, timesteps, prediction_type: str, *, sigma_data: float = 0.5, start: int = 0) -> CoefficientTable:
    """Euler's method as in `euler`, for a model that is preconditioned as in EDM (arXiv:2206.00364, Eq. 7 and Table 1).

    Args:
        sigmas: [S + 1], noise levels with x = x0 + sigma*noise.
        timesteps: [S].
        sigma_data: standard deviation of the data; the model sees x/sqrt(sigma^2 + sigma_data^2).
    """
    timesteps = schedule("timesteps", timesteps, start=start)
    sigmas = schedule("sigmas", sigmas, length=len(timesteps) + 1)
    scale = model_input_scale(sigmas, sigma_data)
    rows = []
    for i in range(start, len(timesteps)):
        s, n = sigmas[i], sigmas[i + 1]
        p, q = denoised_weights_edm(prediction_type, s, sigma_data)
        rows.append(row(p=p, q=q, a=n / s, b0=1 - n / s, s=scale[i + 1]))
    return build("edm-euler", rows, timesteps, start=start, input_scale=scale[start], levels=levels(1.0, sigmas))
