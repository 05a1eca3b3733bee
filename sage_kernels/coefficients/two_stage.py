"""Solvers that call the model twice per step: Heun, DPM-Solver-2 with and without noise, and Heun for flow matching.

In the first call of a step `stage` is 1: rows may not branch after it, because the second call starts again from L, the
sample before the step.
"""

from __future__ import annotations

import numpy as np

from .convert import denoised_weights_scaled, derivative_weights, model_input_scale
from .table import CoefficientTable, build, levels, row, schedule


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
    known = levels(1.0, sigmas, begin=_begin(len(timesteps), start))
    return build("heun", rows, timesteps, start=start, input_scale=scale[start], stage=stage, levels=known)


@np.errstate(divide="ignore", invalid="ignore")
def kdpm2(sigmas, middles, timesteps, prediction_type: str, *, start: int = 0) -> CoefficientTable:
    """DPM-Solver-2 in k-diffusion's form (arXiv:2206.00364, Alg. 2 without noise): two calls per step, the last one is Euler's.

    The first stage is Euler's step to the middle, sigma_m = sqrt(s*n) (the midpoint in lambda, arXiv:2206.00927, Alg. 1); the
    second starts again from L, the sample before the step, with the derivative that was found in the middle.

    Args:
        sigmas: [S + 1 or more] with every noise level but the first given twice: s0 s1 s1 s2 s2 ... 0 0.
        middles: [S + 1 or more], where the call before goes to: middles[i + 1] lies between the levels of calls i and i + 2.
        timesteps: [S], those of the levels and the middles in turn. Calls from `start` on are first and second stage in turn.
    """
    return _midpoint("kdpm2", sigmas, np.asarray(middles, dtype=np.float64)[1:], sigmas, None, timesteps, prediction_type, start)


@np.errstate(divide="ignore", invalid="ignore")
def kdpm2_ancestral(sigmas, middles, downs, ups, timesteps, prediction_type: str, *, start: int = 0) -> CoefficientTable:
    """DPM-Solver-2 down to `downs`, then noise of `ups` (k-diffusion's `sample_dpm_2_ancestral`): see `kdpm2`.

    Args:
        sigmas: [S + 1 or more] with every noise level but the first given twice: s0 s1 s1 s2 s2 ... 0 0.
        middles: [S or more], where call i goes to, if it is a first stage.
        downs, ups: [S or more]; call i, if it is a second stage, ends at downs[i - 1] and adds noise of ups[i - 1].
        timesteps: [S]. Calls from `start` on are first and second stage in turn.
    """
    downs = np.append(0.0, np.asarray(downs, dtype=np.float64))
    return _midpoint("kdpm2-a", sigmas, middles, downs, ups, timesteps, prediction_type, start)


def _midpoint(solver: str, sigmas, middles, ends, ups, timesteps, prediction_type: str, start: int) -> CoefficientTable:
    """Steps from sigmas[i] over middles[i] to ends[i + 1], for the first stages i; `ups` is None without noise.

    A second stage is x' = L + (end - s)*d(x; middle): d = (x - x0)/sigma comes from x and y, without x0's cancellation.
    """
    timesteps = schedule("timesteps", timesteps, start=start)
    calls = len(timesteps)
    sigmas = schedule("sigmas", sigmas[: calls + 1], length=calls + 1)
    middles, ends = np.asarray(middles, dtype=np.float64), np.asarray(ends, dtype=np.float64)
    stage = np.zeros(calls, dtype=np.int64)
    rows = []
    for i in range(start, calls):
        if (i - start) % 2 == 0:
            s, n = sigmas[i], middles[i]
            p, q = denoised_weights_scaled(prediction_type, s)
            rows.append(row(p=p, q=q, a=n / s, b0=1 - n / s, s=model_input_scale(n)))
            stage[i] = 1 if i + 1 < calls else 0
        else:
            s, middle, width = sigmas[i - 1], middles[i - 1], ends[i] - sigmas[i - 1]
            p, q = denoised_weights_scaled(prediction_type, middle)
            now_x, now_y = derivative_weights(prediction_type, middle)
            noise = 0.0 if ups is None else ups[i - 1]
            weights = dict(u0=width * now_x, u1=1.0, a=1.0, e=width * now_y, c=noise)
            rows.append(row(p=p, q=q, s=model_input_scale(sigmas[i + 1]), **weights))
    known = levels(1.0, sigmas, begin=_begin(calls, start))
    return build(solver, rows, timesteps, start=start, input_scale=model_input_scale(sigmas[start]), stage=stage, levels=known)


def flow_heun(sigmas, timesteps, *, start: int = 0) -> CoefficientTable:
    """Heun's method (arXiv:2206.00364, Alg. 1) for flow matching, y = dx/dsigma; the last step is Euler's.

    Args:
        sigmas: [S + 1] with every noise level but the first and the last given twice: s0 s1 s1 s2 s2 ... 0.
        timesteps: [S], doubled in the same way. Calls from `start` on are first and second stage in turn.

    What is stored is the velocity y. The second stage restarts from L and reads the first stage's velocity as m1.
    """
    timesteps = schedule("timesteps", timesteps, start=start)
    sigmas = schedule("sigmas", sigmas, length=len(timesteps) + 1)
    stage = np.zeros(len(timesteps), dtype=np.int64)
    rows = []
    for i in range(start, len(timesteps)):
        if (i - start) % 2 == 0:
            rows.append(row(p=0.0, q=1.0, a=1.0, b0=sigmas[i + 1] - sigmas[i]))
            stage[i] = 1 if i + 1 < len(timesteps) else 0
        else:
            half = (sigmas[i] - sigmas[i - 1]) / 2
            rows.append(row(p=0.0, q=1.0, u0=0.0, u1=1.0, a=1.0, b0=half, b1=half))
    clean = np.stack([np.ones(len(timesteps)), -sigmas[:-1]], axis=1)  # x0 = x - sigma*y
    known = levels(1 - sigmas, sigmas, begin=_begin(len(timesteps), start), clean=clean)
    return build("flow-heun", rows, timesteps, start=start, stage=stage, levels=known)


def _begin(calls: int, start: int) -> np.ndarray:
    """[S]: the call that began the step of each call, first and second stages in turn from `start` on."""
    numbers = np.arange(calls)
    return np.where((numbers >= start) & ((numbers - start) % 2 == 1), numbers - 1, numbers)
