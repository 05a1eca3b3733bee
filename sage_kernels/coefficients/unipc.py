"""UniPC (arXiv:2302.04867): predictor UniP and corrector UniC in one row, for the denoised sample."""

from __future__ import annotations

from collections.abc import Collection
from math import factorial

import numpy as np

from .convert import alpha_sigma, denoised_weights, half_log_snr, phi
from .table import CoefficientTable, build, levels, row, schedule


@np.errstate(divide="ignore", invalid="ignore")
def unipc(
    sigmas,
    timesteps,
    prediction_type: str,
    *,
    order: int = 2,
    bh: str = "bh2",
    flow: bool = False,
    lower_order_final: bool = True,
    disable_corrector: Collection[int] = (),
    start: int = 0,
) -> CoefficientTable:
    """UniPC of order 1 to 3 in data prediction, with B(h) = h (bh1) or e^h - 1 (bh2).

    Each call first corrects the sample it was called with, now that its model output is known: the corrector restarts
    from L, the corrected sample of the call before. Then it predicts the next sample from the corrected one. The model
    output is not evaluated again.

    Args:
        sigmas: [S + 1]; sigma_t/alpha_t, or sigma_t with `flow`.
        timesteps: [S].
        lower_order_final: the order falls to 1 towards the last step.
        disable_corrector: steps after whose prediction no correction takes place.
    """
    if order not in (1, 2, 3):
        raise NotImplementedError(f"unipc: order {order}; there are 1, 2, 3")
    if bh not in ("bh1", "bh2"):
        raise NotImplementedError(f"unipc: solver_type {bh!r}; there are bh1, bh2")
    timesteps = schedule("timesteps", timesteps, start=start)
    sigmas = schedule("sigmas", sigmas, length=len(timesteps) + 1)
    alphas, noises = alpha_sigma(sigmas, flow)
    lambdas = half_log_snr(sigmas, flow)
    steps = len(timesteps)
    rows = []
    previous = 0  # order of the step before
    for i in range(start, steps):
        # flow_prediction is relative to the schedule's own sigma, whatever alpha is
        noise = sigmas[i] if prediction_type == "flow_prediction" else noises[i]
        p, q = denoised_weights(prediction_type, alphas[i], noise)
        now = min(order, steps - i) if lower_order_final else order
        now = min(now, i - start + 1)
        correction = {}
        if i > start and i - 1 not in disable_corrector:
            nodes = lambdas[i - previous : i][::-1]  # where m1 .. m_previous were evaluated
            w, w_now = _corrector(alphas[i], lambdas[i], nodes, bh)
            w = np.append(w, np.zeros(3 - len(w)))
            correction = dict(u0=0.0, u1=noises[i] / noises[i - 1], u2=w_now, u3=w[0], u4=w[1], u5=w[2])
        b = _predictor(alphas[i + 1], lambdas[i + 1], lambdas[i - now + 1 : i + 1][::-1], bh)
        b = np.append(b, np.zeros(3 - len(b)))
        rows.append(row(p=p, q=q, a=noises[i + 1] / noises[i], b0=b[0], b1=b[1], b2=b[2], **correction))
        previous = now
    return build("unipc", rows, timesteps, start=start, levels=levels(alphas, noises))


def _predictor(alpha: float, target: float, nodes: np.ndarray, bh: str) -> np.ndarray:
    """Weights of m0, m1, ... in UniP (Alg. 2), from lambda = nodes[0] to `target`; m_k was evaluated at nodes[k].

    x' = sigma'/sigma*x - alpha'*(e^-h - 1)*m0 - alpha'*B*sum_k rho_k*(m_k - m0)/r_k
    """
    h = target - nodes[0]
    weights = np.zeros(len(nodes))
    weights[0] = -alpha * np.expm1(-h)
    if len(nodes) == 1 or h == 0:  # two equal noise levels: nothing to do
        return weights
    r = (nodes[1:] - nodes[0]) / h
    rho = np.array([0.5]) if len(r) == 1 else _solve(r, -h, bh)  # for order 2 the paper takes 1/2 for every B
    return _add_differences(weights, -alpha * _big_b(-h, bh) * rho / r)


def _corrector(alpha: float, target: float, nodes: np.ndarray, bh: str) -> tuple[np.ndarray, float]:
    """Weights of (m1, m2, ...) and of m0 in UniC (Alg. 1), from lambda = nodes[0] to `target`, where m0 was evaluated.

    xc = sigma/sigma_L*L - alpha*(e^-h - 1)*m1 - alpha*B*[sum_k rho_k*(m_{k+1} - m1)/r_k + rho_p*(m0 - m1)]
    """
    h = target - nodes[0]
    weights = np.zeros(len(nodes) + 1)
    weights[0] = -alpha * np.expm1(-h)
    r = np.append((nodes[1:] - nodes[0]) / h, 1.0)
    rho = np.array([0.5]) if len(r) == 1 else _solve(r, -h, bh)  # for order 1 the paper takes 1/2 for every B
    weights = _add_differences(weights, -alpha * _big_b(-h, bh) * rho / r)
    return weights[:-1], weights[-1]


def _add_differences(weights: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Add sum_k scale[k]*(m_{k+1} - m_0) to the weights of m_0, m_1, ..."""
    weights[1:] += scale
    weights[0] -= scale.sum()
    return weights


def _big_b(z: float, bh: str) -> float:
    """B(h) in data prediction, z = -h."""
    return z if bh == "bh1" else np.expm1(z)


def _solve(r: np.ndarray, z: float, bh: str) -> np.ndarray:
    """rho with sum_k r_k^(j-1)*rho_k = z*j!*phi_{j+1}(z)/B for j = 1 .. len(r) (Theorem 3.1's condition)."""
    right = np.array([factorial(j) * phi(j + 1, z) for j in range(1, len(r) + 1)])
    if bh == "bh2":
        right /= phi(1, z)
    if not np.isfinite(r).all():
        return np.full(len(r), np.nan)
    return np.linalg.solve(np.vander(r, increasing=True).T, right)
