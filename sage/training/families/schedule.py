"""The noise levels that a pipeline's scheduler stands for, continued to every timestep of training."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler

_FLOW = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler)
_VARIANCE_PRESERVING = ("epsilon", "v_prediction", "sample")


class NoiseSchedule:
    """x_t = alpha_t·x + sigma_t·noise at the timesteps of a scheduler.

    - Variance preserving: t counts the entries of `alphas_cumprod`, alpha_t = sqrt(alphas_cumprod[t]), sigma_t² = 1 − alpha_t².
      That is also what the denoiser is given by solvers that keep x + s·noise (Euler, Heun, LMS): they divide by sqrt(1 + s²) first.
    - Flow matching: sigma_t = t / num_train_timesteps, alpha_t = 1 − sigma_t, for every real t. A shift of the schedule (fixed, or
      by the picture's size) decides which timesteps sampling visits, not how noisy the latents are at one of them.

    Args:
        scheduler: a diffusers scheduler; only its config and `alphas_cumprod` are read.

    Attributes:
        prediction_type: "epsilon", "v_prediction", "sample", or "flow_prediction" (noise − x).
        num_train_timesteps: T; timesteps are in [0, T), for flow matching in [0, T].
        continuous: whether timesteps may be fractions (flow matching).

    Raises:
        NotImplementedError: the scheduler is of neither kind, predicts something else, or counts its timesteps up.
    """

    def __init__(self, scheduler):
        config, name = scheduler.config, type(scheduler).__name__
        self.num_train_timesteps: int = config.num_train_timesteps
        if config.get("invert_sigmas", False):
            raise NotImplementedError(f"{name}: invert_sigmas counts timesteps up from 0; give the pipeline a scheduler that counts down")
        self.continuous = isinstance(scheduler, _FLOW) or config.get("prediction_type") == "flow_prediction"
        if self.continuous:
            self.prediction_type = "flow_prediction"
            return
        self.prediction_type: str = config.get("prediction_type", "")
        if self.prediction_type not in _VARIANCE_PRESERVING or not torch.is_tensor(getattr(scheduler, "alphas_cumprod", None)):
            raise NotImplementedError(
                f"{name} with prediction_type {self.prediction_type!r} cannot be trained with: there are schedulers with alphas_cumprod that "
                f"predict {', '.join(_VARIANCE_PRESERVING)}, and those for flow matching; give the pipeline one of these"
            )
        alphas_cumprod = scheduler.alphas_cumprod.double()
        self._levels = torch.stack([alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()]).float()  # [2, T]

    def levels(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha_t and sigma_t, float32 [R] each, on the timesteps' device.

        Args:
            timesteps: [R]; whole numbers of an integer dtype, for flow matching of any dtype. That they are in range is not checked
                (it would wait for the device).
        """
        if self.continuous:
            sigma = timesteps.float() / self.num_train_timesteps
            return 1 - sigma, sigma
        if timesteps.is_floating_point():
            raise TypeError(
                f"timesteps must be of an integer dtype, for they count the {self.num_train_timesteps} entries of alphas_cumprod, got "
                f"{timesteps.dtype}; use timesteps.long()"
            )
        self._levels = self._levels.to(timesteps.device)
        alpha, sigma = self._levels[:, timesteps.long()]
        return alpha, sigma
