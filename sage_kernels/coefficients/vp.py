"""One-step solvers on a variance-preserving schedule alphas_cumprod: DDIM and DDPM."""

from __future__ import annotations

import numpy as np

from .convert import denoised_weights, noise_weights
from .table import CoefficientTable, Levels, build, row, schedule


@np.errstate(divide="ignore", invalid="ignore")
def ddim(
    alphas_cumprod,
    final_alpha_cumprod: float,
    timesteps,
    prev_timesteps,
    prediction_type: str,
    *,
    eta: float = 0.0,
    clip: float | None = None,
    start: int = 0,
) -> CoefficientTable:
    """DDIM (arXiv:2010.02502).

    Args:
        alphas_cumprod: [T], alpha_t squared, by training timestep.
        final_alpha_cumprod: what stands for alphas_cumprod where `prev_timesteps` is negative.
        timesteps, prev_timesteps: integers [S].
        eta: 0 is deterministic, 1 has the noise of DDPM.
        clip: clamp the predicted x0 to [-clip, clip]; the predicted noise stays as it was.
    """
    timesteps = schedule("timesteps", timesteps, start=start)
    prev_timesteps = schedule("prev_timesteps", prev_timesteps, length=len(timesteps))
    alphas_cumprod = schedule("alphas_cumprod", alphas_cumprod)
    rows = []
    for t, t_prev in zip(timesteps[start:].astype(int), prev_timesteps[start:].astype(int)):
        A = alphas_cumprod[t]
        P = alphas_cumprod[t_prev] if t_prev >= 0 else final_alpha_cumprod
        alpha, sigma = np.sqrt(A), np.sqrt(1 - A)
        p, q = denoised_weights(prediction_type, alpha, sigma)
        share = (1 - A / P) / (1 - A)
        std = eta * np.sqrt((1 - P) * share)  # Eq. 16
        direction = np.sqrt((1 - P) * (1 - eta**2 * share))  # sqrt(1 - P - std^2), the weight of eps in Eq. 12
        if clip is None:  # eps = (x - alpha*m0)/sigma
            a, b0 = direction / sigma, np.sqrt(P) - direction * alpha / sigma
            rows.append(row(p=p, q=q, a=a, b0=b0, c=std))
        else:
            eps_x, eps_y = noise_weights(prediction_type, alpha, sigma)
            rows.append(
                row(p=p, q=q, clip=clip, a=direction * eps_x, b0=np.sqrt(P), e=direction * eps_y, c=std)
            )
    after = _after(alphas_cumprod, prev_timesteps, final_alpha_cumprod)
    return build("ddim", rows, timesteps, start=start, levels=_levels(alphas_cumprod[timesteps.astype(int)], after))


DDPM_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large")


@np.errstate(divide="ignore", invalid="ignore")
def ddpm(
    alphas_cumprod,
    timesteps,
    prev_timesteps,
    prediction_type: str,
    *,
    variance_type: str = "fixed_small",
    clip: float | None = None,
    start: int = 0,
) -> CoefficientTable:
    """Ancestral sampling of DDPM (arXiv:2006.11239), Eqs. 6 and 7; the last step goes to alphas_cumprod = 1.

    Args:
        alphas_cumprod: [T], alpha_t squared, by training timestep.
        timesteps, prev_timesteps: integers [S]; a negative previous timestep stands for the clean sample.
        variance_type: fixed_small and fixed_small_log are the posterior variance, fixed_large is beta_t.
        clip: clamp the predicted x0 to [-clip, clip].
    """
    if variance_type not in DDPM_VARIANCES:
        raise NotImplementedError(f"ddpm: variance_type {variance_type!r}; there are {', '.join(DDPM_VARIANCES)}")
    timesteps = schedule("timesteps", timesteps, start=start)
    prev_timesteps = schedule("prev_timesteps", prev_timesteps, length=len(timesteps))
    alphas_cumprod = schedule("alphas_cumprod", alphas_cumprod)
    rows = []
    for t, t_prev in zip(timesteps[start:].astype(int), prev_timesteps[start:].astype(int)):
        A = alphas_cumprod[t]
        P = alphas_cumprod[t_prev] if t_prev >= 0 else 1.0
        beta = 1 - A / P
        p, q = denoised_weights(prediction_type, np.sqrt(A), np.sqrt(1 - A))
        small = max((1 - P) / (1 - A) * beta, 1e-20)  # Eq. 7; the floor is the one diffusers takes the log of
        std = np.sqrt(beta if variance_type == "fixed_large" else small)
        rows.append(
            row(
                p=p,
                q=q,
                clip=np.inf if clip is None else clip,
                a=np.sqrt(A / P) * (1 - P) / (1 - A),  # Eq. 7, weight of x_t
                b0=np.sqrt(P) * beta / (1 - A),  # Eq. 7, weight of x0
                c=std if t > 0 else 0.0,
            )
        )
    after = _after(alphas_cumprod, prev_timesteps, 1.0)
    return build("ddpm", rows, timesteps, start=start, levels=_levels(alphas_cumprod[timesteps.astype(int)], after))


def _after(alphas_cumprod: np.ndarray, prev_timesteps: np.ndarray, final: float | None) -> np.ndarray:
    """[S]: alphas_cumprod after each step; unknown after the last where `final` is None."""
    last = np.nan if final is None else final
    return np.where(prev_timesteps >= 0, alphas_cumprod[np.maximum(prev_timesteps, 0).astype(int)], last)


def _levels(now: np.ndarray, after: np.ndarray) -> Levels:
    """From alphas_cumprod before and after each step, [S] each."""
    pairs = (np.stack([np.sqrt(squared), np.sqrt(1 - squared)], axis=1) for squared in (now, after))
    return Levels(*pairs, np.tile([0.0, 1.0], (len(now), 1)))
