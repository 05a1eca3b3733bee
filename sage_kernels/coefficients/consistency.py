"""Samplers of distilled models: consistency (LCM), trajectory consistency (TCD), and continuous-time consistency (sCM)."""

from __future__ import annotations

import numpy as np

from .convert import denoised_weights, noise_weights
from .table import CoefficientTable, build, levels, row, schedule


@np.errstate(divide="ignore", invalid="ignore")
def lcm(
    alphas_cumprod,
    timesteps,
    prediction_type: str,
    *,
    num_inference_steps: int | None = None,
    timestep_scaling: float = 10.0,
    sigma_data: float = 0.5,
    clip: float | None = None,
    start: int = 0,
) -> CoefficientTable:
    """Latent consistency models (arXiv:2310.04378): multistep consistency sampling, arXiv:2303.01469, Alg. 1.

    Each row denoises with f = c_skip*x + c_out*x0, which is what is stored, and adds fresh noise for the next timestep; no
    noise follows the row `num_inference_steps - 1` (by default the last one).
    """
    timesteps = schedule("timesteps", timesteps, start=start)
    alphas_cumprod = schedule("alphas_cumprod", alphas_cumprod)
    last = (len(timesteps) if num_inference_steps is None else num_inference_steps) - 1
    steps = timesteps.astype(int)
    rows, returned = [], np.zeros((len(steps), 2))
    for i in range(start, len(steps)):
        A = alphas_cumprod[steps[i]]
        P = alphas_cumprod[steps[min(i + 1, len(steps) - 1)]]
        p, q = denoised_weights(prediction_type, np.sqrt(A), np.sqrt(1 - A))
        k = steps[i] * timestep_scaling
        c_skip = sigma_data**2 / (k**2 + sigma_data**2)  # boundary condition: f is the identity at k = 0
        c_out = k / np.sqrt(k**2 + sigma_data**2)
        signal, noise = (1.0, 0.0) if i == last else (np.sqrt(P), np.sqrt(1 - P))
        if clip is None:
            rows.append(row(p=c_out * p + c_skip, q=c_out * q, b0=signal, c=noise))
        else:  # x0 is clipped before f is taken, so x0 is what is stored
            rows.append(row(p=p, q=q, clip=clip, a=signal * c_skip, b0=signal * c_out, c=noise))
            returned[i] = c_skip, c_out
    after = alphas_cumprod[np.append(steps, steps[-1])]
    after[last + 1 :] = 1.0
    known = levels(np.sqrt(after), np.sqrt(1 - after))
    return build("lcm", rows, timesteps, start=start, returned=None if clip is None else returned, levels=known)


@np.errstate(divide="ignore", invalid="ignore")
def tcd(
    alphas_cumprod,
    timesteps,
    middle_timesteps,
    prediction_type: str,
    *,
    num_inference_steps: int | None = None,
    stochastic: bool = True,
    start: int = 0,
) -> CoefficientTable:
    """Strategic stochastic sampling of trajectory consistency distillation (arXiv:2402.19159, Alg. 4).

    Each row goes along the trajectory to a timestep below the next one, which is what is stored, and adds fresh noise up to
    the next timestep. The last row ends where it went; what comes after the last timestep is timestep 0.

    Args:
        alphas_cumprod: [T], alpha_t squared, by training timestep.
        timesteps: integers [S].
        middle_timesteps: integers [S], (1 - gamma) times the next timestep.
        num_inference_steps: no noise follows row `num_inference_steps - 1` (by default the last one).
        stochastic: False where gamma is 0.
    """
    timesteps = schedule("timesteps", timesteps, start=start)
    middle_timesteps = schedule("middle_timesteps", middle_timesteps, length=len(timesteps))
    alphas_cumprod = schedule("alphas_cumprod", alphas_cumprod)
    last = (len(timesteps) if num_inference_steps is None else num_inference_steps) - 1
    steps = np.append(timesteps, 0).astype(int)
    rows = []
    for i in range(start, len(timesteps)):
        A, P, M = (alphas_cumprod[int(t)] for t in (steps[i], steps[i + 1], middle_timesteps[i]))
        alpha, sigma = np.sqrt(A), np.sqrt(1 - A)
        p, q = denoised_weights(prediction_type, alpha, sigma)
        eps_x, eps_y = noise_weights(prediction_type, alpha, sigma)
        signal, noise = (np.sqrt(P / M), np.sqrt(1 - P / M)) if stochastic and i != last else (1.0, 0.0)
        stored = dict(p=np.sqrt(M) * p + np.sqrt(1 - M) * eps_x, q=np.sqrt(M) * q + np.sqrt(1 - M) * eps_y)
        rows.append(row(**stored, b0=signal, c=noise))
    return build("tcd", rows, timesteps, start=start)


def scm(timesteps, *, sigma_data: float = 0.5, start: int = 0) -> CoefficientTable:
    """Multistep sampling of continuous-time consistency models in TrigFlow (arXiv:2410.11081, Sec. 3).

    x = cos(t)*x0 + sin(t)*noise with noise of standard deviation sigma_data; x0 = cos(t)*x - sin(t)*y.

    Args:
        timesteps: [S + 1] angles, the last one is where sampling ends.
        sigma_data: standard deviation of the data.
    """
    angles = schedule("timesteps", timesteps)
    calls = schedule("timesteps", angles[:-1], start=start)
    rows = [
        row(p=np.cos(now), q=-np.sin(now), b0=np.cos(after), c=sigma_data * np.sin(after))
        for now, after in zip(angles[start:-1], angles[start + 1 :])
    ]
    return build("scm", rows, calls, start=start, levels=levels(np.cos(angles), sigma_data * np.sin(angles)))
