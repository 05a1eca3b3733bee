"""One reader per diffusers scheduler class: from its schedule and config to a call of `sage_kernels.coefficients`."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from sage_kernels import coefficients
from sage_kernels.coefficients import CoefficientTable


class NotInTable(NotImplementedError):
    """This scheduler, option or argument does not go through the coefficient table; the message says which."""


def array(values) -> np.ndarray:
    return values.detach().to("cpu", torch.float64).numpy() if torch.is_tensor(values) else np.asarray(values, float)


def _clip(config) -> float | None:
    return float(config.clip_sample_range) if config.clip_sample else None


def _ddim(scheduler, begin: int, eta: float) -> CoefficientTable:
    timesteps = array(scheduler.timesteps)
    if not 0 <= eta <= 1:
        raise NotInTable(f"DDIMScheduler: eta = {eta:g} is outside [0, 1]")
    return coefficients.ddim(
        array(scheduler.alphas_cumprod),
        float(scheduler.final_alpha_cumprod),
        timesteps,
        timesteps - scheduler.config.num_train_timesteps // scheduler.num_inference_steps,
        scheduler.config.prediction_type,
        eta=eta,
        clip=_clip(scheduler.config),
        start=begin,
    )


def _ddpm(scheduler, begin: int, eta: float) -> CoefficientTable:
    variance_type = scheduler.variance_type
    if variance_type != scheduler.config.variance_type:
        raise NotInTable(f"DDPMScheduler: variance_type {variance_type} differs from its config's")
    timesteps = array(scheduler.timesteps)
    return coefficients.ddpm(
        array(scheduler.alphas_cumprod),
        timesteps,
        np.append(timesteps[1:], -1),
        scheduler.config.prediction_type,
        variance_type=variance_type,
        clip=_clip(scheduler.config),
        start=begin,
    )


def _lcm(scheduler, begin: int, eta: float) -> CoefficientTable:
    return coefficients.lcm(
        array(scheduler.alphas_cumprod),
        array(scheduler.timesteps),
        scheduler.config.prediction_type,
        num_inference_steps=scheduler.num_inference_steps,
        timestep_scaling=scheduler.config.timestep_scaling,
        clip=_clip(scheduler.config),
        start=begin,
    )


def _euler(scheduler, begin: int, eta: float) -> CoefficientTable:
    prediction_type = scheduler.config.prediction_type
    prediction_type = "sample" if prediction_type == "original_sample" else prediction_type
    return coefficients.euler(array(scheduler.sigmas), array(scheduler.timesteps), prediction_type, start=begin)


def _euler_ancestral(scheduler, begin: int, eta: float) -> CoefficientTable:
    return coefficients.euler_ancestral(
        array(scheduler.sigmas), array(scheduler.timesteps), _no_sample_prediction(scheduler), start=begin
    )


def _no_sample_prediction(scheduler) -> str:
    """The prediction type of a class whose own `step` refuses the type "sample"."""
    if scheduler.config.prediction_type == "sample":
        raise NotInTable(f"{type(scheduler).__name__}: prediction_type sample, which its own step refuses")
    return scheduler.config.prediction_type


def _heun(scheduler, begin: int, eta: float) -> CoefficientTable:
    return coefficients.heun(
        array(scheduler.sigmas),
        array(scheduler.timesteps),
        scheduler.config.prediction_type,
        clip=_clip(scheduler.config),
        start=begin,
    )


def _flow_euler(scheduler, begin: int, eta: float) -> CoefficientTable:
    return coefficients.flow_euler(
        array(scheduler.sigmas),
        array(scheduler.timesteps),
        stochastic=scheduler.config.stochastic_sampling,
        start=begin,
    )


def _dpmpp(scheduler, begin: int, eta: float) -> CoefficientTable:
    config = scheduler.config
    if config.algorithm_type not in ("dpmsolver++", "sde-dpmsolver++"):
        raise NotInTable(f"DPMSolverMultistepScheduler: algorithm_type {config.algorithm_type} integrates the noise")
    if config.variance_type is not None:
        raise NotInTable(f"DPMSolverMultistepScheduler: variance_type {config.variance_type}: the model output is wider")
    return coefficients.dpmpp(
        array(scheduler.sigmas),
        array(scheduler.timesteps),
        config.prediction_type,
        order=config.solver_order,
        sde=config.algorithm_type == "sde-dpmsolver++",
        solver_type=config.solver_type,
        flow=config.use_flow_sigmas,
        lower_order_final=config.lower_order_final,
        euler_at_final=config.euler_at_final,
        final_sigmas_zero=config.final_sigmas_type == "zero",
        start=begin,
    )


def _unipc(scheduler, begin: int, eta: float) -> CoefficientTable:
    config = scheduler.config
    if not scheduler.predict_x0:
        raise NotInTable("UniPCMultistepScheduler: predict_x0=False integrates the noise")
    if scheduler.solver_p is not None:
        raise NotInTable("UniPCMultistepScheduler: solver_p replaces the predictor by another scheduler")
    return coefficients.unipc(
        array(scheduler.sigmas),
        array(scheduler.timesteps),
        config.prediction_type,
        order=config.solver_order,
        bh=config.solver_type,
        flow=config.use_flow_sigmas,
        lower_order_final=config.lower_order_final,
        disable_corrector=tuple(scheduler.disable_corrector),
        start=begin,
    )


def _deis(scheduler, begin: int, eta: float) -> CoefficientTable:
    config = scheduler.config
    return coefficients.deis(
        array(scheduler.sigmas),
        array(scheduler.timesteps),
        config.prediction_type,
        order=config.solver_order,
        flow=config.use_flow_sigmas,
        lower_order_final=config.lower_order_final,
        start=begin,
    )


def _lms(scheduler, begin: int, eta: float) -> CoefficientTable:
    sigmas, timesteps = array(scheduler.sigmas), array(scheduler.timesteps)
    return coefficients.lms(sigmas, timesteps, scheduler.config.prediction_type, start=begin)


def _kdpm2(scheduler, begin: int, eta: float) -> CoefficientTable:
    return coefficients.kdpm2(
        array(scheduler.sigmas),
        array(scheduler.sigmas_interpol),
        array(scheduler.timesteps),
        _no_sample_prediction(scheduler),
        start=begin,
    )


def _kdpm2_ancestral(scheduler, begin: int, eta: float) -> CoefficientTable:
    return coefficients.kdpm2_ancestral(
        array(scheduler.sigmas),
        array(scheduler.sigmas_interpol),
        array(scheduler.sigmas_down),
        array(scheduler.sigmas_up),
        array(scheduler.timesteps),
        _no_sample_prediction(scheduler),
        start=begin,
    )


def _dpmpp_singlestep(scheduler, begin: int, eta: float) -> CoefficientTable:
    config = scheduler.config
    if config.algorithm_type not in ("dpmsolver++", "sde-dpmsolver++"):
        raise NotInTable(f"DPMSolverSinglestepScheduler: algorithm_type {config.algorithm_type} integrates the noise")
    if config.variance_type is not None:
        raise NotInTable(f"DPMSolverSinglestepScheduler: variance_type {config.variance_type}: the model output is wider")
    return coefficients.dpmpp_singlestep(
        array(scheduler.sigmas),
        array(scheduler.timesteps),
        config.prediction_type,
        scheduler.order_list,
        sde=config.algorithm_type == "sde-dpmsolver++",
        solver_type=config.solver_type,
        flow=config.use_flow_sigmas,
        start=begin,
    )


def _edm_euler(scheduler, begin: int, eta: float) -> CoefficientTable:
    return coefficients.edm_euler(
        array(scheduler.sigmas),
        array(scheduler.timesteps),
        scheduler.config.prediction_type,
        sigma_data=scheduler.config.sigma_data,
        start=begin,
    )


def _edm_dpmpp(scheduler, begin: int, eta: float) -> CoefficientTable:
    config = scheduler.config
    return coefficients.edm_dpmpp(
        array(scheduler.sigmas),
        array(scheduler.timesteps),
        config.prediction_type,
        sigma_data=config.sigma_data,
        order=config.solver_order,
        sde=config.algorithm_type == "sde-dpmsolver++",
        solver_type=config.solver_type,
        lower_order_final=config.lower_order_final,
        euler_at_final=config.euler_at_final,
        final_sigmas_zero=config.final_sigmas_type == "zero",
        start=begin,
    )


def _tcd(scheduler, begin: int, eta: float) -> CoefficientTable:
    if not 0 <= eta <= 1:
        raise NotInTable(f"TCDScheduler: eta = {eta:g} is outside [0, 1]")
    after = torch.cat([scheduler.timesteps[1:], scheduler.timesteps.new_zeros(1)]).cpu()
    return coefficients.tcd(
        array(scheduler.alphas_cumprod),
        array(scheduler.timesteps),
        array(torch.floor((1 - eta) * after)),  # in torch, whose float32 product decides which integer is below
        scheduler.config.prediction_type,
        num_inference_steps=scheduler.num_inference_steps,
        stochastic=eta > 0,
        start=begin,
    )


def _scm(scheduler, begin: int, eta: float) -> CoefficientTable:
    if scheduler.config.prediction_type != "trigflow":
        raise NotInTable(f"SCMScheduler: prediction_type {scheduler.config.prediction_type}, which its own step refuses")
    return coefficients.scm(array(scheduler.timesteps), sigma_data=scheduler.config.sigma_data, start=begin)


def _cogvideox_ddim(scheduler, begin: int, eta: float) -> CoefficientTable:
    timesteps = array(scheduler.timesteps)
    return coefficients.ddim(
        array(scheduler.alphas_cumprod),
        float(scheduler.final_alpha_cumprod),
        timesteps,
        timesteps - scheduler.config.num_train_timesteps // scheduler.num_inference_steps,
        scheduler.config.prediction_type,
        start=begin,
    )


def _flow_heun(scheduler, begin: int, eta: float) -> CoefficientTable:
    return coefficients.flow_heun(array(scheduler.sigmas), array(scheduler.timesteps), start=begin)


def _flow_lcm(scheduler, begin: int, eta: float) -> CoefficientTable:
    if scheduler._scale_factors and scheduler._upscale_mode:
        raise NotInTable("FlowMatchLCMScheduler: scale_factors make the sample larger between two steps")
    table = coefficients.flow_euler(array(scheduler.sigmas), array(scheduler.timesteps), stochastic=True, start=begin)
    return dataclasses.replace(table, solver="flow-lcm")


def _flow_euler_ancestral(scheduler, begin: int, eta: float) -> CoefficientTable:
    return coefficients.flow_euler_ancestral(
        array(scheduler.sigmas),
        array(scheduler.timesteps),
        eta=scheduler.config.eta,
        s_noise=scheduler.config.s_noise,
        start=begin,
    )


READERS = {
    "CogVideoXDDIMScheduler": _cogvideox_ddim,
    "DDIMParallelScheduler": _ddim,  # its `step` is DDIM's; `batch_step_no_noise` is not replaced
    "DDIMScheduler": _ddim,
    "DDPMParallelScheduler": _ddpm,
    "DDPMScheduler": _ddpm,
    "DEISMultistepScheduler": _deis,
    "DPMSolverMultistepScheduler": _dpmpp,
    "DPMSolverSinglestepScheduler": _dpmpp_singlestep,
    "EDMDPMSolverMultistepScheduler": _edm_dpmpp,
    "EDMEulerScheduler": _edm_euler,
    "EulerAncestralDiscreteScheduler": _euler_ancestral,
    "EulerDiscreteScheduler": _euler,
    "FlowMatchEulerDiscreteScheduler": _flow_euler,
    "FlowMatchHeunDiscreteScheduler": _flow_heun,
    "FlowMatchLCMScheduler": _flow_lcm,
    "HeunDiscreteScheduler": _heun,
    "KDPM2AncestralDiscreteScheduler": _kdpm2_ancestral,
    "KDPM2DiscreteScheduler": _kdpm2,
    "LCMScheduler": _lcm,
    "LMSDiscreteScheduler": _lms,
    "LTXEulerAncestralRFScheduler": _flow_euler_ancestral,
    "SCMScheduler": _scm,
    "TCDScheduler": _tcd,
    "UniPCMultistepScheduler": _unipc,
}
