"""Losses of trunk, branch and joint: pure functions of model outputs, targets (`sage.training.targets`) and noise levels.

    z, denoised = trunk_batch("posterior", latents, noise, segments, alpha, sigma, generator)
    loss = denoising_loss(family.predict(z, t, family.mean_conditions(...)), z, denoised, alpha, sigma, "epsilon", snr_gamma=5.0)

Every loss is a sum over rows divided by a count. On several processes, give all of them the same count: the sum of the losses is then
that of one process with all rows, however the rows are spread. (Where gradients are averaged over processes, as
DistributedDataParallel does, that count is rows of all processes / processes.)
"""

from __future__ import annotations

import torch

from sage.training.targets import Segments, check_prediction_type, describe, model_target, weighted_sum


def min_snr_weight(
    alpha: torch.Tensor, sigma: torch.Tensor, prediction_type: str, snr_gamma: float | None
) -> torch.Tensor | None:
    """Min-SNR weights (arXiv:2303.09556) of a squared error in model-output space.

    The weight of an error in x is min(snr, gamma) with snr = alpha²/sigma². By sigma·y = s·z − r·x (see `model_target`) an error in y
    is r/sigma times that in x, so y has the weight

        epsilon          min(snr, gamma) / snr        = min(1, gamma·sigma²/alpha²)
        v_prediction     min(snr, gamma) / (snr + 1)  = min(alpha², gamma·sigma²)       with alpha² + sigma² = 1
        sample           min(snr, gamma)
        flow_prediction  min(snr, gamma)·sigma²       = min(alpha², gamma·sigma²)       with alpha = 1 − sigma

    The paper has the first three. The last is the same weight in x carried over to velocities, as r = 1 for them too.

    Args:
        alpha, sigma: [R].
        snr_gamma: gamma, above 0 (the paper's is 5); None: no weights.

    Returns:
        float64 [R], or None for None. At alpha = 0 the weight is 1 for epsilon and 0 for all others.
    """
    check_prediction_type("min_snr_weight", prediction_type)
    if snr_gamma is None:
        return None
    if isinstance(snr_gamma, bool) or not snr_gamma > 0:
        raise ValueError(f"min_snr_weight: snr_gamma must be a number above 0, or None for no weights, got {snr_gamma!r}")
    signal, noise = alpha.double().square(), sigma.double().square()
    if prediction_type == "epsilon":
        return (snr_gamma * noise / signal).clamp(max=1.0)
    if prediction_type == "sample":
        return (signal / noise).clamp(max=snr_gamma)
    return torch.minimum(signal, snr_gamma * noise)


def weighted_mse(
    prediction: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    count: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """Σ_r weight_r · mean((prediction_r − target_r)²) / count.

    Args:
        prediction, target: [R, ...]. The target takes part as a constant.
        weight: [R]; None: 1.
        count: what the sum over rows is divided by; None: R. Rows with weight 0 count too.

    Returns:
        0-dim, float32 (float64 if an input is); 0 for no rows.
    """
    if prediction.shape != target.shape or prediction.ndim < 2:
        raise ValueError(f"weighted_mse: target must have the prediction's shape, [R, ...] = {list(prediction.shape)}, got "
                         f"{describe(target)}")
    if weight is not None and weight.shape != prediction.shape[:1]:
        raise ValueError(f"weighted_mse: weight must be [{len(prediction)}], one number per row, got {describe(weight)}")
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    errors = (prediction.to(dtype) - target.detach().to(dtype)).square().flatten(1).mean(1)  # [R]
    if weight is not None:
        errors = errors * weight.to(errors.device, dtype)
    return errors.sum() / (max(len(errors), 1) if count is None else count)


def denoising_loss(
    model_output: torch.Tensor,
    z: torch.Tensor,
    denoised: torch.Tensor,
    alpha: torch.Tensor,
    sigma: torch.Tensor,
    prediction_type: str,
    *,
    snr_gamma: float | None = None,
    count: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss of trunk and branch alike, in the model's own parametrisation.

    With a `branch_batch` and each member's own condition this is the ordinary denoising loss; with a `trunk_batch` and the mean
    condition it teaches the group's mixture.

    Args:
        model_output: [R, ...], the model's for z.
        z, denoised: [R, ...], what it was given (before a cast to its dtype) and what it should make of it.
        alpha, sigma: [R].
        prediction_type: see `model_target`.
        snr_gamma: see `min_snr_weight`.
        count: see `weighted_mse`.
    """
    target = model_target(denoised, z, alpha, sigma, prediction_type)
    return weighted_mse(model_output, target, min_snr_weight(alpha, sigma, prediction_type, snr_gamma), count)


def consistency_loss(
    trunk_output: torch.Tensor,
    member_outputs: torch.Tensor,
    weights: torch.Tensor,
    segments: Segments,
    weight: torch.Tensor | None = None,
    count: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """The prediction under the mean condition against what the members' predictions make of the same z.

    For a mixture of members that were equally likely, E[x | z] = Σ_n p(n | z)·E[x | z, n]: the denoiser of the mixture is the mean of
    the members' denoisers, weighted by how likely each is to have made z. The denoisers are the model's own under the members'
    conditions; p(n | z) is not known to it, and is estimated from the members' latents by `posterior_weights`. At one z the model
    output is affine in x with the same coefficients for all members (see `model_target`) and the weights sum to 1, so that the mean
    may be taken of model outputs, whatever their parametrisation. No gradient goes to the members, from whom the trunk learns: call the
    model for them under `no_grad`.

    Args:
        trunk_output: [nodes, ...], the model's for z [nodes, ...] under the mean conditions.
        member_outputs: [M, ...], the model's for `segments.expand(z)` under the members' own conditions `segments.gather(conditions)`.
        weights: [M], `posterior_weights` of that z.
        weight: [nodes], of a squared error in model-output space (`min_snr_weight`); None: 1.
        count: see `weighted_mse`.
    """
    if len(member_outputs) != len(segments.rows) or member_outputs.shape[1:] != trunk_output.shape[1:]:
        raise ValueError(f"consistency_loss: member_outputs must be {[len(segments.rows), *trunk_output.shape[1:]]}, a row per member, got "
                         f"{describe(member_outputs)}")
    return weighted_mse(trunk_output, weighted_sum(member_outputs, weights, segments), weight, count)
