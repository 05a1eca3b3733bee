"""From model outputs to denoised samples, from schedules to (alpha, sigma, lambda), and the phi functions."""

from __future__ import annotations

from math import factorial

import numpy as np
from numpy.polynomial.polynomial import polyfromroots

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")


def denoised_weights(prediction_type: str, alpha: float, sigma: float) -> tuple[float, float]:
    """(p, q) with x0 = p*x + q*y, where x = alpha*x0 + sigma*noise.

    epsilon: y = noise. v_prediction (arXiv:2202.00512, App. D): y = alpha*noise - sigma*x0, alpha^2 + sigma^2 = 1.
    sample: y = x0. flow_prediction: y = noise - x0, alpha = 1 - sigma.
    """
    if prediction_type == "epsilon":
        if alpha == 0:
            raise NotImplementedError(
                "prediction_type epsilon at zero terminal SNR: with alpha_t = 0 the noise says nothing about x0"
            )
        return 1 / alpha, -sigma / alpha
    if prediction_type == "v_prediction":
        return alpha, -sigma
    if prediction_type == "sample":
        return 0.0, 1.0
    if prediction_type == "flow_prediction":
        return 1.0, -sigma
    raise NotImplementedError(f"prediction_type {prediction_type!r}; there are {', '.join(PREDICTION_TYPES)}")


def noise_weights(prediction_type: str, alpha: float, sigma: float) -> tuple[float, float]:
    """(weight of x, weight of y) of the predicted noise, alpha^2 + sigma^2 = 1."""
    if prediction_type == "epsilon":
        return 0.0, 1.0
    if prediction_type == "v_prediction":
        return sigma, alpha
    if prediction_type == "sample":
        return 1 / sigma, -alpha / sigma
    raise NotImplementedError(f"prediction_type {prediction_type!r} with clipping; there are {PREDICTION_TYPES[:3]}")


def denoised_weights_scaled(prediction_type: str, sigma: float) -> tuple[float, float]:
    """(p, q) with x0 = p*x + q*y, where x = x0 + sigma*noise and the model saw x/sqrt(sigma^2 + 1)."""
    if prediction_type == "epsilon":
        return 1.0, -sigma
    if prediction_type == "v_prediction":  # c_skip and c_out of arXiv:2206.00364, Table 1, for unit-variance data
        return 1 / (sigma**2 + 1), -sigma / np.sqrt(sigma**2 + 1)
    if prediction_type == "sample":
        return 0.0, 1.0
    raise NotImplementedError(f"prediction_type {prediction_type!r}; there are {', '.join(PREDICTION_TYPES[:3])}")


def derivative_weights(prediction_type: str, sigma: float) -> tuple[float, float]:
    """(weight of x, weight of y) of (x - x0)/sigma for `denoised_weights_scaled`, without its cancellation."""
    if prediction_type == "epsilon":
        return 0.0, 1.0
    if prediction_type == "v_prediction":
        return sigma / (sigma**2 + 1), 1 / np.sqrt(sigma**2 + 1)
    return 1 / sigma, -1 / sigma


def denoised_weights_edm(prediction_type: str, sigma: float, sigma_data: float) -> tuple[float, float]:
    """(c_skip, c_out) of EDM, x0 = c_skip*x + c_out*y (arXiv:2206.00364, Table 1); v_prediction has the opposite sign of y."""
    variance = sigma**2 + sigma_data**2
    signs = {"epsilon": 1.0, "v_prediction": -1.0}
    if prediction_type not in signs:
        raise NotImplementedError(f"prediction_type {prediction_type!r}; there are {', '.join(signs)}")
    return sigma_data**2 / variance, signs[prediction_type] * sigma * sigma_data / np.sqrt(variance)


def model_input_scale(sigma, sigma_data: float = 1.0):
    """1/sqrt(sigma^2 + sigma_data^2): what the Euler family multiplies a sample with before the model sees it."""
    return 1 / np.sqrt(np.square(sigma) + sigma_data**2)


def alpha_sigma(sigmas: np.ndarray, flow: bool) -> tuple[np.ndarray, np.ndarray]:
    """(alpha_t, sigma_t) of a schedule: variance preserving with sigmas = sigma_t/alpha_t, or flow matching."""
    if flow:
        return 1 - sigmas, sigmas
    alpha = 1 / np.sqrt(sigmas**2 + 1)
    return alpha, sigmas * alpha


def half_log_snr(sigmas: np.ndarray, flow: bool) -> np.ndarray:
    """lambda_t = log(alpha_t) - log(sigma_t); +inf where sigma is 0."""
    with np.errstate(divide="ignore"):
        return np.log1p(-sigmas) - np.log(sigmas) if flow else -np.log(sigmas)


def phi(k: int, z: float) -> float:
    """phi_1(z) = (e^z - 1)/z, phi_{k+1}(z) = (phi_k(z) - 1/k!)/z: the functions of exponential integrators.

    The recursion cancels near 0, so the series sum_j z^j/(j+k)! is used there.
    """
    if abs(z) < 1:
        return sum(z**j / factorial(j + k) for j in range(20))
    value = np.expm1(z) / z
    for j in range(1, k):
        value = (value - 1 / factorial(j)) / z
    return value


def lagrange(nodes: np.ndarray) -> np.ndarray:
    """[N, N]: row k holds the coefficients of 1, z, z^2, ... of the polynomial that is 1 at nodes[k], 0 at the other nodes."""
    others = [np.delete(nodes, k) for k in range(len(nodes))]
    return np.array([polyfromroots(rest) / np.prod(node - rest) for node, rest in zip(nodes, others)])
