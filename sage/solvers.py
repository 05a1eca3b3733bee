"""Read a configured diffusers scheduler into a coefficient table, or say why it has none.

This module and `sage.solver_readers` are the one place that knows diffusers' schedulers. `table_for` reads what
`set_timesteps` left on the scheduler (sigmas, timesteps, alphas_cumprod, config) and calls the solver's function in
`sage_kernels.coefficients`. A class, an option or an argument of `step` that a table row does not express exactly raises
`NotInTable`, which names it; the caller then uses the scheduler's own `step`.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sage.solver_readers import READERS, NotInTable, array
from sage_kernels.coefficients import CoefficientTable

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
    "dpm++2s": (
        "DPMSolverSinglestepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "lower_order_final": True},
    ),
    "dpm++3s": (
        "DPMSolverSinglestepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 3, "lower_order_final": True},
    ),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "kdpm2-a": ("KDPM2AncestralDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "flow-euler": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": False}),
    "flow-heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "flow-lcm": ("FlowMatchLCMScheduler", {}),
}


def table_for(scheduler, *, begin: int = 0, eta: float | None = None, **step_arguments) -> CoefficientTable:
    """The coefficient table of `scheduler` as configured, from step `begin` on.

    Args:
        scheduler: a diffusers scheduler after `set_timesteps`. A subclass counts as its diffusers class as long as it
            overrides nothing that the table replaces, or is marked with `_sage_wrapper = True` in its own body.
        begin: index into `scheduler.timesteps` of the first step that runs (img2img); multistep solvers warm up there.
        eta: of the `step` of DDIM and TCD (there: gamma); None is the class's default, 0 and 0.3.
        step_arguments: further keyword arguments that `scheduler.step` would be given.

    Raises:
        NotInTable: naming the class, option or argument.
        ValueError: `set_timesteps` was not called, or `begin` is not one of its steps.
    """
    name = table_class(scheduler)
    eta = _eta(name, eta)
    check_step_arguments(**step_arguments)
    if eta != 0 and name not in _DEFAULT_ETA:
        raise NotInTable(f"{name}: eta = {eta:g}; only {', '.join(_DEFAULT_ETA)} take it")
    if not has_schedule(scheduler):
        raise ValueError(f"{name}: call set_timesteps before making its table")
    if not 0 <= begin < _calls(name, scheduler):
        raise ValueError(f"{name}: begin must be one of the {_calls(name, scheduler)} steps, got {begin}")
    if getattr(scheduler.config, "thresholding", False):
        raise NotInTable(f"{name}: thresholding (dynamic thresholding) takes a quantile of every sample")
    try:
        return READERS[name](scheduler, begin, eta)
    except NotInTable:
        raise
    except NotImplementedError as error:
        raise NotInTable(f"{name}: {error}") from error


def check_step_arguments(**arguments) -> None:
    """Raise NotInTable for a keyword argument of diffusers' `step` that changes the update and is not in the table."""
    for name, value in arguments.items():
        if name in _NEUTRAL_ARGUMENTS or value is None or value is False or (name, value) in _NEUTRAL_VALUES:
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
    if name in _DPM_NAMES:
        family, ending = _DPM_NAMES[name]
        if not config.algorithm_type.endswith("++"):
            return config.algorithm_type
        order = "1" if config.solver_order == 1 and ending == "m" else f"{config.solver_order}{ending}"
        return family + order + ("-sde" if config.algorithm_type.startswith("sde-") else "")
    if name == "FlowMatchEulerDiscreteScheduler":
        return "flow-euler-sde" if config.stochastic_sampling else "flow-euler"
    return _NAMES[name]


def noise_draws(scheduler, *, begin: int = 0, eta: float | None = None) -> np.ndarray:
    """bool [S]: the calls in which diffusers' own `step` draws noise, whether or not a coefficient uses it."""
    name = table_class(scheduler)
    calls = np.arange(_calls(name, scheduler))
    draws = np.zeros(len(calls), dtype=bool)
    draws[begin:] = _DRAWS.get(name, lambda scheduler, calls, eta: False)(scheduler, calls[begin:], _eta(name, eta))
    if name == "KDPM2AncestralDiscreteScheduler":
        draws[begin::2] = False  # first stages
    return draws


def noise_dtype(scheduler, sample_dtype: torch.dtype, model_dtype: torch.dtype) -> torch.dtype:
    """The dtype in which diffusers' own `step` draws its noise (another dtype is another draw)."""
    name = table_class(scheduler)
    if name in _DRAWS_FLOAT32:
        return torch.float32
    if name in _DRAWS_DENOISED_DTYPE and scheduler.config.prediction_type != "sample":
        return torch.promote_types(sample_dtype, model_dtype)
    return model_dtype


@dataclass(frozen=True)
class Coverage:
    """How one scheduler class of diffusers runs.

    Args:
        table: whether its steps go through the coefficient table; otherwise its own `step` runs, with sharing too.
        reason: why not; empty if they do.
        solvers: its names for the command line.
        leaves: options and arguments of `step` with which its own `step` runs all the same.
    """

    table: bool
    reason: str
    solvers: tuple[str, ...]
    leaves: tuple[str, ...]


def coverage() -> dict[str, Coverage]:
    """How every scheduler class of the installed diffusers runs, by class name."""
    from diffusers import schedulers

    found = {}
    for name in sorted(n for n in dir(schedulers) if n.endswith("Scheduler")):
        reason = "" if name in READERS else _reason(name)
        solvers = tuple(solver for solver, (cls, _) in SOLVERS.items() if cls == name)
        found[name] = Coverage(not reason, reason, solvers, () if reason else _leaves(getattr(schedulers, name)))
    return found


def has_schedule(scheduler) -> bool:
    """Whether `set_timesteps` was called; NotInTable where the class has no table."""
    if table_class(scheduler) in _COUNTS_NO_STEPS or getattr(scheduler, "custom_timesteps", False):
        return True
    return getattr(scheduler, "num_inference_steps", None) is not None


def stock_class(cls: type) -> type | None:
    """The first class of diffusers among `cls` and what it inherits from."""
    return next((base for base in cls.__mro__ if base.__module__.startswith("diffusers.")), None)


def table_class(scheduler) -> str:
    """Name of the diffusers class whose table stands for `scheduler`; NotInTable if there is none."""
    own = [name for name, value in vars(scheduler).items() if callable(value) and name in dir(type(scheduler))]
    if own:
        raise NotInTable(f"{type(scheduler).__name__}: {', '.join(sorted(own))} was replaced on this object")
    for cls in type(scheduler).__mro__:
        if cls.__module__.startswith("diffusers."):
            if cls.__name__ in READERS:
                return cls.__name__
            raise NotInTable(f"{cls.__name__}: {_reason(cls.__name__)}")
        overridden = [n for n, v in vars(cls).items() if callable(v) and not n.startswith("__") and n not in _HARMLESS]
        if overridden and not vars(cls).get("_sage_wrapper", False):
            raise NotInTable(f"{cls.__name__}: overrides {', '.join(sorted(overridden))} of its diffusers class")
    raise NotInTable(f"{type(scheduler).__name__}: not a diffusers scheduler")


def _eta(name: str, eta: float | None) -> float:
    return _DEFAULT_ETA.get(name, 0.0) if eta is None else eta


def _calls(name: str, scheduler) -> int:
    """How many denoiser calls the schedule has; the last timestep of sCM is only where sampling ends."""
    return len(scheduler.timesteps) - (name == "SCMScheduler")


def _reason(name: str) -> str:
    return _OUTSIDE.get(name, "no solver function for this class")


def _leaves(cls: type) -> tuple[str, ...]:
    """What makes a class of the table run its own `step`: its config's options, then arguments of its `step`."""
    options = ["thresholding"] if "thresholding" in inspect.signature(cls.__init__).parameters else []
    options += _LEAVES.get(cls.__name__, ())
    arguments = _REFUSED_ARGUMENTS.keys() - {"variance_noise"}  # SageScheduler passes that on
    return tuple(options) + tuple(name for name in inspect.signature(cls.step).parameters if name in arguments)


_DEFAULT_ETA = {"DDIMScheduler": 0.0, "DDIMParallelScheduler": 0.0, "TCDScheduler": 0.3}
_COUNTS_NO_STEPS = ("EDMEulerScheduler",)  # its set_timesteps(sigmas=...) leaves num_inference_steps at None
_DPM_NAMES = {
    "DPMSolverMultistepScheduler": ("dpm++", "m"),
    "DPMSolverSinglestepScheduler": ("dpm++", "s"),
    "EDMDPMSolverMultistepScheduler": ("edm-dpm++", "m"),
}
_NAMES = {cls: name for name, (cls, overrides) in SOLVERS.items() if not overrides} | {
    "CogVideoXDDIMScheduler": "ddim",
    "DDIMParallelScheduler": "ddim",
    "DDPMParallelScheduler": "ddpm",
    "EDMEulerScheduler": "edm-euler",
    "LTXEulerAncestralRFScheduler": "flow-euler-a",
    "SCMScheduler": "scm",
}

# Whether diffusers' own step draws noise, from (scheduler, calls, eta); classes that are not here never do.
_DRAWS = {
    "DDIMScheduler": lambda scheduler, calls, eta: eta > 0,
    "DDIMParallelScheduler": lambda scheduler, calls, eta: eta > 0,
    "DDPMScheduler": lambda scheduler, calls, eta: array(scheduler.timesteps)[calls] > 0,
    "DDPMParallelScheduler": lambda scheduler, calls, eta: array(scheduler.timesteps)[calls] > 0,
    "DPMSolverMultistepScheduler": lambda scheduler, calls, eta: scheduler.config.algorithm_type.startswith("sde-"),
    "DPMSolverSinglestepScheduler": lambda scheduler, calls, eta: scheduler.config.algorithm_type.startswith("sde-"),
    "EDMDPMSolverMultistepScheduler": lambda scheduler, calls, eta: scheduler.config.algorithm_type.startswith("sde-"),
    "EulerAncestralDiscreteScheduler": lambda scheduler, calls, eta: True,
    "FlowMatchEulerDiscreteScheduler": lambda scheduler, calls, eta: bool(scheduler.config.stochastic_sampling),
    "FlowMatchLCMScheduler": lambda scheduler, calls, eta: True,
    "KDPM2AncestralDiscreteScheduler": lambda scheduler, calls, eta: True,
    "LCMScheduler": lambda scheduler, calls, eta: calls != scheduler.num_inference_steps - 1,
    "LTXEulerAncestralRFScheduler": lambda scheduler, calls, eta: (
        (np.abs(np.append(array(scheduler.sigmas), 0.0)[calls + 1]) >= 1e-8)
        & (scheduler.config.eta > 0)
        & (scheduler.config.s_noise > 0)
    ),
    "SCMScheduler": lambda scheduler, calls, eta: True,
    "TCDScheduler": lambda scheduler, calls, eta: (eta > 0) & (calls != scheduler.num_inference_steps - 1),
}
_DRAWS_FLOAT32 = (
    "DPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "LTXEulerAncestralRFScheduler",
    "SCMScheduler",
)
_DRAWS_DENOISED_DTYPE = (
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "LCMScheduler",
    "TCDScheduler",
)

# Methods a subclass may override: the table reads their result, or they are not part of the update.
_HARMLESS = {"set_timesteps", "set_begin_index", "add_noise", "scale_noise", "get_velocity"}

_NEUTRAL_ARGUMENTS = {"generator", "return_dict", "s_tmin", "s_tmax", "s_noise"}  # the s_ ones act through s_churn only
_NEUTRAL_VALUES = (("s_churn", 0), ("order", 4))
_REFUSED_ARGUMENTS = {
    "s_churn": "raises the noise level before the model is called",
    "per_token_timesteps": "gives every token its own noise level",
    "use_clipped_model_output": "predicts the noise again from the clipped sample",
    "variance_noise": "the caller's own noise; the table's noise is drawn or passed elsewhere",
    "pred_original_sample": "the caller's own denoised sample",
    "order": "the table has the default order, 4",
}
_ZERO_SNR = "prediction_type epsilon at zero terminal SNR"
_LEAVES = dict.fromkeys(
    ["EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler"],
    ("prediction_type sample",),
) | {
    "CogVideoXDDIMScheduler": (_ZERO_SNR, "eta other than 0"),
    "DDIMScheduler": (_ZERO_SNR, "eta outside [0, 1]"),
    "DDIMParallelScheduler": (_ZERO_SNR, "eta outside [0, 1]"),
    "DDPMScheduler": (_ZERO_SNR, "variance_type fixed_large_log, learned, learned_range"),
    "DDPMParallelScheduler": (_ZERO_SNR, "variance_type fixed_large_log, learned, learned_range"),
    "DPMSolverMultistepScheduler": ("algorithm_type dpmsolver, sde-dpmsolver", "variance_type learned, learned_range"),
    "DPMSolverSinglestepScheduler": ("algorithm_type dpmsolver", "variance_type learned, learned_range"),
    "FlowMatchLCMScheduler": ("scale_factors",),
    "LCMScheduler": (_ZERO_SNR,),
    "SCMScheduler": ("prediction_type other than trigflow",),
    "TCDScheduler": (_ZERO_SNR, "eta outside [0, 1]"),
    "UniPCMultistepScheduler": ("predict_x0=False", "solver_p", "solver_order above 3"),
}

_OUTSIDE = (
    dict.fromkeys(
        ["AmusedScheduler", "BlockRefinementScheduler", "DiscreteDDIMScheduler", "EntropyBoundScheduler"]
        + ["VQDiffusionScheduler"],
        "its samples are discrete tokens",
    )
    | dict.fromkeys(["CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler"], "Brownian-tree noise")
    | dict.fromkeys(
        ["DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"],
        "linear, but it goes from picture to noise, where there is nothing to share",
    )
    | dict.fromkeys(
        ["CMStochasticIterativeScheduler", "ConsistencyDecoderScheduler", "IPNDMScheduler"],
        "linear, but no pipeline with prompts steps with it",
    )
    | dict.fromkeys(["HeliosDMDScheduler", "HeliosScheduler"], "its schedule is set again in the middle of a call")
    | dict.fromkeys(["ScoreSdeVeScheduler", "ScoreSdeVpScheduler"], "it has no `step`: predictor and corrector are called apart")
    | {
        "CogVideoXDPMScheduler": "it draws noise twice per step, and its caller passes the earlier prediction and timestep",
        "DDPMWuerstchenScheduler": "linear, but it takes the noise level from a timestep per row",
        "KarrasVeScheduler": "its corrector is called apart from its `step`",
        "FlowMapEulerDiscreteScheduler": "every call goes to a timestep that its caller chooses",
        "MiniMaxH3Scheduler": "it takes the noise level from the timestep as rounded to the sample's dtype",
        "PNDMScheduler": "it drops one of its first two outputs, so the fifth call reads that of four calls ago; a row reads three",
        "PiflowScheduler": "one call holds a policy of many steps",
        "RFD4ProteinaScheduler": "a mask of the caller's multiplies every step's result",
        "RePaintScheduler": "it blends the caller's picture and mask into every step",
        "SASolverScheduler": "its corrector reads the noise of the step before, which no row holds",
        "UnCLIPScheduler": "its caller passes the timestep that a step goes to, and the variance may be learned",
    }
)
