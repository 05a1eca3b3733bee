"""One-step solvers on a schedule of sigmas: Euler, Euler ancestral, Heun, and Euler for flow matching."""

from __future__ import annotations

import numpy as np

from .convert import denoised_weights_scaled, derivative_weights, model_input_scale
from .table import CoefficientTable, build, row, schedule


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
    return build("euler", rows, timesteps, start=start, input_scale=scale[start])


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
    return build("euler-a", rows, timesteps, start=start, input_scale=scale[start])


@np.errstate(divide="ignore", invalid="ignore")
def heun(sigmas, timesteps, prediction_type: str, *, clip: float | None = None, start: int = 0) -> CoefficientTable:
    """Heun's method (arXiv:2206.00364, Alg. 1): two calls per step, the last step is Euler's.

    Args:
        sigmas: [S + 1] with every noise level but the first and the last given twice: s0 s1 s1 s2 s2 ... 0.
        timesteps: [S], doubled in the same way. Calls from `start` on are first and second stage in turn.
        clip: clamp the predicted x0 to [-clip, clip].

    What is stored is x0, so derivatives are d(x, x0; sigma) = (x - x0)/sigma. The second stage restarts from L, the
    sample before the first stage, and reads the first stage's x0 as m1. Its own derivative is taken from x and y where
    nothing is clipped: a second stage at a small sigma would magnify the rounding of x - x0.
    """
    timesteps = schedule("timesteps", timesteps, start=start)
    sigmas = schedule("sigmas", sigmas, length=len(timesteps) + 1)
    scale = model_input_scale(sigmas)
    clipping = np.inf if clip is None else clip
    stage = np.zeros(len(timesteps), dtype=np.int64)
    rows = []
    for i in range(start, len(timesteps)):
        if (i - start) % 2 == 0:
            s, n = sigmas[i], sigmas[i + 1]
            p, q = denoised_weights_scaled(prediction_type, s)
            rows.append(row(p=p, q=q, clip=clipping, a=n / s, b0=1 - n / s, s=scale[i + 1]))  # Alg. 1, line 5
            stage[i] = 1 if i + 1 < len(timesteps) else 0
        else:
            s, n = sigmas[i - 1], sigmas[i]
            p, q = denoised_weights_scaled(prediction_type, n)
            half = (n - s) / 2
            past = dict(u1=1 + half / s, a=1.0, b1=-half / s, s=scale[i + 1])  # L + half*d(L, m1; s)
            if clip is None:
                now_x, now_y = derivative_weights(prediction_type, n)
                now = dict(u0=half * now_x, e=half * now_y)
            else:
                now = dict(u0=half / n, b0=-half / n, clip=clip)
            rows.append(row(p=p, q=q, **past, **now))  # Alg. 1, line 8:  ... + half*d(x, m0; n)
    return build("heun", rows, timesteps, start=start, input_scale=scale[start], stage=stage)


def flow_euler(sigmas, timesteps, *, stochastic: bool = False, start: int = 0) -> CoefficientTable:
    """Euler's method for flow matching (arXiv:2210.02747; arXiv:2209.03003), y = dx/dsigma = noise - x0.

    Args:
        sigmas: [S + 1] with x = (1 - sigma)*x0 + sigma*noise.
        stochastic: predict x0, then noise it afresh to the next level, instead of following the flow.

    What is stored is the velocity y, or x0 when stochastic.
    """
    timesteps = schedule("timesteps", timesteps, start=start)
    sigmas = schedule("sigmas", sigmas, length=len(timesteps) + 1)
    rows = []
    for s, n in zip(sigmas[start:-1], sigmas[start + 1 :]):
        if stochastic:
            rows.append(row(p=1.0, q=-s, a=0.0, b0=1 - n, c=n))
        else:
            rows.append(row(p=0.0, q=1.0, a=1.0, b0=n - s))
    return build("flow-euler-sde" if stochastic else "flow-euler", rows, timesteps, start=start)
