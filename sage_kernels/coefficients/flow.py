"""One-step solvers for flow matching: x = (1 - sigma)*x0 + sigma*noise, and the model predicts the velocity noise - x0."""

from __future__ import annotations

import numpy as np

from .table import CoefficientTable, build, levels, row, schedule


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
    clean = (0.0, 1.0) if stochastic else np.stack([np.ones(len(timesteps)), -sigmas[:-1]], axis=1)  # x0 = x - s*y
    levels_of = levels(1 - sigmas, sigmas, clean=clean)
    return build("flow-euler-sde" if stochastic else "flow-euler", rows, timesteps, start=start, levels=levels_of)


@np.errstate(divide="ignore", invalid="ignore")
def flow_euler_ancestral(sigmas, timesteps, *, eta: float = 1.0, s_noise: float = 1.0, start: int = 0) -> CoefficientTable:
    """Ancestral sampling with Euler steps for flow matching (k-diffusion's ancestral step, written for alpha = 1 - sigma).

    Euler down to d = n*(1 + (n/s - 1)*eta), then scaled from signal 1 - d to signal 1 - n and noised up to n again.

    Args:
        sigmas: [N + 1], the last one is where sampling ends.
        timesteps: [S]; calls from the N-th on leave the sample as it is.
        eta: 0 is Euler's method, 1 steps as far down as the next level's noise allows.
        s_noise: factor of the fresh noise.
    """
    timesteps = schedule("timesteps", timesteps, start=start)
    sigmas = schedule("sigmas", sigmas)
    rows = []
    for i in range(start, len(timesteps)):
        if i + 1 >= len(sigmas):
            rows.append(row(p=0.0, q=1.0, a=1.0))
            continue
        s, n = sigmas[i], sigmas[i + 1]
        down = n * (1 + (n / s - 1) * eta) if abs(n) >= 1e-8 else 0.0  # below 1e-8 diffusers ends at x0
        gain, noise = 1.0, 0.0
        if abs(n) >= 1e-8 and eta > 0 and s_noise > 0:  # the 1e-12 are diffusers', against a division by zero at d = 1
            gain = (1 - n) / (1 - down + 1e-12)
            noise = s_noise * np.sqrt(max(n**2 - down**2 * (1 - n) ** 2 / ((1 - down) ** 2 + 1e-12), 0.0))
        rows.append(row(p=1.0, q=-s, a=gain * down / s, b0=gain * (1 - down / s), c=noise))
    known = np.append(sigmas, np.full(max(len(timesteps) + 1 - len(sigmas), 0), sigmas[-1]))[: len(timesteps) + 1]
    return build("flow-euler-a", rows, timesteps, start=start, levels=levels(1 - known, known))
