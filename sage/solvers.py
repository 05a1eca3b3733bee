"""Read a configured diffusers scheduler into a coefficient table, or say why it has none.

This is the one place that knows diffusers' schedulers. `table_for` reads what `set_timesteps` left on the scheduler
(sigmas, timesteps, alphas_cumprod, config) and calls the solver's function in `sage_kernels.coefficients`. A class, an
option or an argument of `step` that a table row does not express exactly raises `NotInTable`, which names it; the caller
then uses the scheduler's own `step`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sage_kernels import coefficients
from sage_kernels.coefficients import CoefficientTable


class NotInTable(NotImplementedError):
    """This scheduler, option or argument does not go through the coefficient table; the message says which."""


# Command-line name -> (diffusers class, config overrides).
SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "dpm++1": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 1}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpm++3m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 3}),
    "dpm++2m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "flow-euler": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": False}),
}


def table_for(scheduler, *, begin: int = 0, eta: float = 0.0, **step_arguments) -> CoefficientTable:
    """The coefficient table of `scheduler` as configured, from step `begin` on.

    Args:
        scheduler: a diffusers scheduler after `set_timesteps`. A subclass counts as its diffusers class as long as it
            overrides nothing that the table replaces, or is marked with `_sage_wrapper = True` in its own body.
        begin: index into `scheduler.timesteps` of the first step that runs (img2img); multistep solvers warm up there.
        eta: of DDIM's `step`.
        step_arguments: further keyword arguments that `scheduler.step` would be given.

    Raises:
        NotInTable: naming the class, option or argument.
        ValueError: `set_timesteps` was not called, or `begin` is not one of its steps.
    """
    name = table_class(scheduler)
    check_step_arguments(**step_arguments)
    if eta != 0 and name not in _TAKES_ETA:
        raise NotInTable(f"{name}: eta = {eta:g}; only {' and '.join(_TAKES_ETA)} take it")
    if getattr(scheduler, "num_inference_steps", None) is None and not getattr(scheduler, "custom_timesteps", False):
        raise ValueError(f"{name}: call set_timesteps before making its table")
    if not 0 <= begin < len(scheduler.timesteps):
        raise ValueError(f"{name}: begin must be one of the {len(scheduler.timesteps)} steps, got {begin}")
    if getattr(scheduler.config, "thresholding", False):
        raise NotInTable(f"{name}: thresholding (dynamic thresholding) takes a quantile of every sample")
    try:
        return _READERS[name](scheduler, begin, eta)
    except NotInTable:
        raise
    except NotImplementedError as error:
        raise NotInTable(f"{name}: {error}") from error


def check_step_arguments(**arguments) -> None:
    """Raise NotInTable for a keyword argument of diffusers' `step` that changes the update and is not in the table."""
    for name, value in arguments.items():
        if name in _NEUTRAL_ARGUMENTS or value is None or value is False or (name == "s_churn" and value == 0):
            continue
        reason = _REFUSED_ARGUMENTS.get(name, "not known to the coefficient table")
        raise NotInTable(f"step argument {name}: {reason}")


def solver_name(scheduler) -> str:
    """The command-line name of the scheduler's solver; its class name if the class is outside the table."""
    try:
        name = table_class(scheduler)
    except NotInTable:
        return type(scheduler).__name__
    config = scheduler.config
    if name == "DPMSolverMultistepScheduler":
        sde = "-sde" if config.algorithm_type.startswith("sde-") else ""
        if not config.algorithm_type.endswith("++"):
            return config.algorithm_type
        return ("dpm++1" if config.solver_order == 1 else f"dpm++{config.solver_order}m") + sde
    if name == "FlowMatchEulerDiscreteScheduler":
        return "flow-euler-sde" if config.stochastic_sampling else "flow-euler"
    return _NAMES[name]


def noise_draws(scheduler, *, begin: int = 0, eta: float = 0.0) -> np.ndarray:
    """bool [S]: the calls in which diffusers' own `step` draws noise, whether or not a coefficient uses it."""
    name = table_class(scheduler)
    draws = np.zeros(len(scheduler.timesteps), dtype=bool)
    if name in _TAKES_ETA:
        draws[begin:] = eta > 0
    elif name in ("DDPMScheduler", "DDPMParallelScheduler"):
        draws[begin:] = _array(scheduler.timesteps)[begin:] > 0
    elif name == "EulerAncestralDiscreteScheduler":
        draws[begin:] = True
    elif name == "DPMSolverMultistepScheduler":
        draws[begin:] = scheduler.config.algorithm_type.startswith("sde-")
    elif name == "LCMScheduler":
        draws[begin:] = np.arange(len(draws))[begin:] != scheduler.num_inference_steps - 1
    elif name == "FlowMatchEulerDiscreteScheduler":
        draws[begin:] = bool(scheduler.config.stochastic_sampling)
    return draws


def noise_dtype(scheduler, sample_dtype: torch.dtype, model_dtype: torch.dtype) -> torch.dtype:
    """The dtype in which diffusers' own `step` draws its noise (another dtype is another draw)."""
    name = table_class(scheduler)
    if name in ("DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"):
        return torch.float32
    if name == "LCMScheduler":
        return torch.promote_types(sample_dtype, model_dtype)
    return model_dtype


def coverage() -> dict[str, str]:
    """Every scheduler class of the installed diffusers: "table", or why it keeps its own `step`."""
    from diffusers import schedulers

    names = sorted(n for n in dir(schedulers) if n.endswith("Scheduler"))
    return {n: "table" if n in _READERS else _OUTSIDE.get(n, "no solver function for this class") for n in names}


def table_class(scheduler) -> str:
    """Name of the diffusers class whose table stands for `scheduler`; NotInTable if there is none."""
    for cls in type(scheduler).__mro__:
        if cls.__module__.startswith("diffusers."):
            if cls.__name__ in _READERS:
                return cls.__name__
            raise NotInTable(f"{cls.__name__}: {_OUTSIDE.get(cls.__name__, 'no solver function for this class')}")
        overridden = [n for n, v in vars(cls).items() if callable(v) and not n.startswith("__") and n not in _HARMLESS]
        if overridden and not vars(cls).get("_sage_wrapper", False):
            raise NotInTable(f"{cls.__name__}: overrides {', '.join(sorted(overridden))} of its diffusers class")
    raise NotInTable(f"{type(scheduler).__name__}: not a diffusers scheduler")


def _array(values) -> np.ndarray:
    return values.detach().to("cpu", torch.float64).numpy() if torch.is_tensor(values) else np.asarray(values, float)


def _clip(config) -> float | None:
    return float(config.clip_sample_range) if config.clip_sample else None


def _ddim(scheduler, begin: int, eta: float) -> CoefficientTable:
    timesteps = _array(scheduler.timesteps)
    if not 0 <= eta <= 1:
        raise NotInTable(f"DDIMScheduler: eta = {eta:g} is outside [0, 1]")
    return coefficients.ddim(
        _array(scheduler.alphas_cumprod),
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
    timesteps = _array(scheduler.timesteps)
    return coefficients.ddpm(
        _array(scheduler.alphas_cumprod),
        timesteps,
        np.append(timesteps[1:], -1),
        scheduler.config.prediction_type,
        variance_type=variance_type,
        clip=_clip(scheduler.config),
        start=begin,
    )


def _lcm(scheduler, begin: int, eta: float) -> CoefficientTable:
    return coefficients.lcm(
        _array(scheduler.alphas_cumprod),
        _array(scheduler.timesteps),
        scheduler.config.prediction_type,
        num_inference_steps=scheduler.num_inference_steps,
        timestep_scaling=scheduler.config.timestep_scaling,
        clip=_clip(scheduler.config),
        start=begin,
    )


def _euler(scheduler, begin: int, eta: float) -> CoefficientTable:
    prediction_type = scheduler.config.prediction_type
    prediction_type = "sample" if prediction_type == "original_sample" else prediction_type
    return coefficients.euler(_array(scheduler.sigmas), _array(scheduler.timesteps), prediction_type, start=begin)


def _euler_ancestral(scheduler, begin: int, eta: float) -> CoefficientTable:
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "sample":
        raise NotInTable("EulerAncestralDiscreteScheduler: prediction_type sample, which its own step refuses")
    return coefficients.euler_ancestral(
        _array(scheduler.sigmas), _array(scheduler.timesteps), prediction_type, start=begin
    )


def _heun(scheduler, begin: int, eta: float) -> CoefficientTable:
    return coefficients.heun(
        _array(scheduler.sigmas),
        _array(scheduler.timesteps),
        scheduler.config.prediction_type,
        clip=_clip(scheduler.config),
        start=begin,
    )


def _flow_euler(scheduler, begin: int, eta: float) -> CoefficientTable:
    return coefficients.flow_euler(
        _array(scheduler.sigmas),
        _array(scheduler.timesteps),
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
        _array(scheduler.sigmas),
        _array(scheduler.timesteps),
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
        _array(scheduler.sigmas),
        _array(scheduler.timesteps),
        config.prediction_type,
        order=config.solver_order,
        bh=config.solver_type,
        flow=config.use_flow_sigmas,
        lower_order_final=config.lower_order_final,
        disable_corrector=tuple(scheduler.disable_corrector),
        start=begin,
    )


_READERS = {
    "DDIMScheduler": _ddim,
    "DDIMParallelScheduler": _ddim,  # its `step` is DDIM's; `batch_step_no_noise` is not replaced
    "DDPMScheduler": _ddpm,
    "DDPMParallelScheduler": _ddpm,
    "EulerDiscreteScheduler": _euler,
    "EulerAncestralDiscreteScheduler": _euler_ancestral,
    "DPMSolverMultistepScheduler": _dpmpp,
    "UniPCMultistepScheduler": _unipc,
    "HeunDiscreteScheduler": _heun,
    "LCMScheduler": _lcm,
    "FlowMatchEulerDiscreteScheduler": _flow_euler,
}
_TAKES_ETA = ("DDIMScheduler", "DDIMParallelScheduler")
_NAMES = {cls: name for name, (cls, overrides) in SOLVERS.items() if not overrides}
_NAMES |= {"DDIMParallelScheduler": "ddim", "DDPMParallelScheduler": "ddpm"}

# Methods a subclass may override: the table reads their result, or they are not part of the update.
_HARMLESS = {"set_timesteps", "set_begin_index", "add_noise", "scale_noise", "get_velocity"}

_NEUTRAL_ARGUMENTS = {"generator", "return_dict", "s_tmin", "s_tmax", "s_noise"}  # the s_ ones act through s_churn only
_REFUSED_ARGUMENTS = {
    "s_churn": "raises the noise level before the model is called",
    "per_token_timesteps": "gives every token its own noise level",
    "use_clipped_model_output": "predicts the noise again from the clipped sample",
    "variance_noise": "the caller's own noise; the table's noise is drawn or passed elsewhere",
}

_OUTSIDE = (
    dict.fromkeys(
        ["AmusedScheduler", "BlockRefinementScheduler", "DiscreteDDIMScheduler", "EntropyBoundScheduler"]
        + ["VQDiffusionScheduler"],
        "its samples are discrete tokens",
    )
    | dict.fromkeys(["CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler"], "Brownian-tree noise")
    | dict.fromkeys(
        ["DEISMultistepScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler"]
        + ["PNDMScheduler", "TCDScheduler"],
        "linear, but no solver function for this class yet",
    )
)
