"""A drop-in diffusers scheduler whose `step` is one fused `branch_step` over a coefficient table.

Timesteps, sigmas, config and every option stay diffusers' own: a `SageScheduler` **is** the scheduler class that it replaces
(`isinstance` holds, `save_pretrained` writes that class's name, a saved pipeline loads without this package) with `step`
replaced. Where a class or an option does not fit the table, diffusers' own `step` runs instead, bit for bit, and a warning
says why.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME, SchedulerMixin, SchedulerOutput
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor

from sage.solvers import SOLVERS, NotInTable, check_step_arguments, noise_draws, noise_dtype, table_for
from sage_kernels import branch_step

logger = logging.get_logger(__name__)

# Classes whose own `step` returns the model output's dtype; the others return the promotion of sample and model output.
_RETURNS_MODEL_DTYPE = (
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
)
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class SageScheduler:
    """Mixin that makes a diffusers scheduler step through `sage_kernels.branch_step`; built by `from_config`.

    >>> pipe.scheduler = SageScheduler.from_config(pipe.scheduler.config, solver="dpm++2m")

    It works with or without sharing, as any diffusers scheduler does. `step` takes and returns what the replaced class's
    does: `model_output` and `sample` [B, ...] float32, bfloat16 or float16 (other dtypes go to the class's own `step`).
    """

    _sage_trajectory: Trajectory | None = None  # the table in use since `set_timesteps`; set by the first `step`
    _sage_run: Any = None  # while a shared call is under way: says which rows are one node

    def __new__(cls, *args, **kwargs):
        if cls is SageScheduler:
            raise TypeError("SageScheduler is built from a config: SageScheduler.from_config(pipe.scheduler.config)")
        return super().__new__(cls)

    @classmethod
    def from_config(cls, config, solver: str | None = None, **kwargs):
        """Build a scheduler from a diffusers scheduler config.

        Args:
            config: a scheduler's `config` (any diffusers scheduler's).
            solver: a name from `sage.solvers.SOLVERS`; None keeps the class that the config names.
            kwargs: overrides of config entries, as in diffusers.

        Raises:
            ValueError: unknown `solver` (the known ones are listed), `solver` is None and the config names no class, or the
            solver is not for this kind of model (flow matching or not).
        """
        if cls is not SageScheduler:
            return super().from_config(config, **kwargs)
        base, overrides = _choose(config, solver, kwargs)
        return sage_class(base).from_config(config, **{**overrides, **kwargs})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder: str | None = None, solver: str | None = None, **kwargs):
        """As `from_config`, from a folder or hub id written by `save_pretrained`."""
        config = _ConfigFile.load_config(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        return cls.from_config(config, solver=solver)

    def __reduce__(self):
        state = {key: value for key, value in self.__dict__.items() if key != "_sage_run"}  # a copy is in no shared call
        return _restore, (diffusers_class(type(self)), state)


class _ConfigFile(ConfigMixin):
    config_name = SCHEDULER_CONFIG_NAME


def _choose(config, solver: str | None, kwargs: dict) -> tuple[type, dict]:
    """The diffusers class and the config overrides that a solver name or a config's `_class_name` stand for."""
    import diffusers

    overrides: dict[str, Any] = {}
    if solver is None:
        name = config.get("_class_name")
        if name is None:
            raise ValueError(
                f"solver is required here: the config names no scheduler class; choose one of {', '.join(SOLVERS)}"
            )
    elif solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; known: {', '.join(SOLVERS)}")
    else:
        name, overrides = SOLVERS[solver]
    flow_config = "base_image_seq_len" in config or str(config.get("_class_name")).startswith("FlowMatch")
    if solver is not None and flow_config != name.startswith("FlowMatch"):
        _refuse_family(solver, flow_config, config, {**overrides, **kwargs})
    base = getattr(diffusers, name, None)
    if base is None or not issubclass(base, SchedulerMixin):
        raise ValueError(f"the config names {name!r}, which is no scheduler of the installed diffusers {diffusers.__version__}")
    return base, dict(overrides)


def _refuse_family(solver: str, flow_config: bool, config, chosen: dict) -> None:
    """Refuse to run a flow-matching model with a solver set up for another kind, or the other way round."""
    if flow_config and chosen.get("prediction_type") != "flow_prediction":
        raise ValueError(
            f"the config is a flow-matching model's: use solver 'flow-euler', or pass prediction_type='flow_prediction', "
            f"use_flow_sigmas=True, flow_shift={config.get('shift', 1.0)} with 'dpm++2m' or 'unipc'; got {solver!r} without"
        )
    if not flow_config and "prediction_type" in config:
        raise ValueError(
            f"solver 'flow-euler' is for flow-matching models, but the config's model predicts {config['prediction_type']!r}"
        )


@functools.lru_cache(maxsize=None)
def sage_class(base: type) -> type:
    """The subclass of `base` (a diffusers scheduler class) whose `step` goes through the table.

    It carries `base`'s names, so that configs and saved pipelines name `base`.
    """

    @functools.wraps(base.step)
    def step(self, model_output, timestep, sample, *args, **kwargs):
        return _step(self, base, model_output, timestep, sample, args, kwargs)

    @functools.wraps(base.set_timesteps)
    def set_timesteps(self, *args, **kwargs):
        if self._sage_run is not None and self._sage_run.call > 0:
            raise RuntimeError(
                f"{base.__name__}.set_timesteps was called in the middle of a shared call: another loop runs on the same "
                "scheduler object; give it one of its own (copy.deepcopy)"
            )
        self._sage_trajectory = None
        return base.set_timesteps(self, *args, **kwargs)

    namespace = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_sage_wrapper": True,  # for sage.solvers: what this class overrides is not the user's doing
        "step": step,
        "set_timesteps": set_timesteps,
    }
    return type(base.__name__, (SageScheduler, base), namespace)


def diffusers_class(cls: type) -> type:
    """The scheduler class that `cls` was made from: `cls` itself unless it is a `SageScheduler`."""
    return cls.__mro__[cls.__mro__.index(SageScheduler) + 1] if issubclass(cls, SageScheduler) else cls


def _restore(base: type, state: dict) -> SageScheduler:
    scheduler = object.__new__(sage_class(base))
    scheduler.__dict__.update(state)
    return scheduler


class Trajectory:
    """One run through the table: the row we are at, and what the solver remembers (histories and last sample).

    `table` is None where the scheduler's own `step` must run; `reason` then says why.
    """

    def __init__(self, scheduler, index: int, eta: float):
        self.index, self.eta = index, eta
        self.history: list[torch.Tensor] = []
        self.last_sample: torch.Tensor | None = None
        self.dtype: torch.dtype | None = None  # of the state: the first sample's, float32 if that is not the model's
        self.table, self.reason = None, ""
        self._steps: torch.Tensor | None = None
        try:
            self.table = table_for(scheduler, begin=index, eta=eta)
            self.draws = noise_draws(scheduler, begin=index, eta=eta)  # [S]: where stock draws, used or not
        except NotInTable as error:
            self.reason = str(error)

    def step_rows(self, rows: int, device: torch.device) -> torch.Tensor:
        """int32 [rows]: the current table row, once per output row."""
        if self._steps is None or self._steps.shape[1] != rows or self._steps.device != device:
            numbers = torch.arange(len(self.table), dtype=torch.int32, device=device)
            self._steps = numbers[:, None].repeat(1, rows)
        return self._steps[self.index]

    def remember(self, out) -> None:
        """Push what this step stored; drop what no later row reads."""
        self.history = [out.denoised, *self.history][: self.table.history]
        self.last_sample = out.corrected
        self.index += 1


def _step(scheduler, base: type, model_output, timestep, sample, args: tuple, kwargs: dict):
    """`step` of every `SageScheduler`: one `branch_step`, or the class's own `step` between two gathers.

    Rows of one node are first set to their representative's, then stepped with the representative's noise.
    """
    run = scheduler._sage_run
    representative_of = None  # int64 [B]
    if run is not None:
        representative_of = run.representative_of(sample.device)
        if len(sample) != len(run.plan.leaves):
            raise ValueError(
                f"{base.__name__}.step: sample has {len(sample)} rows, but the plan has {len(run.plan.leaves)} pictures; "
                "sharing needs one row per picture in the scheduler's step"
            )
    if args:  # options given by position, after self, model_output, timestep, sample
        kwargs = {**dict(zip(list(inspect.signature(base.step).parameters)[4:], args)), **kwargs}
    trajectory = _trajectory(scheduler, base, timestep, model_output, sample, kwargs)
    if trajectory.table is None:
        out = _own_step(scheduler, base, model_output, timestep, sample, kwargs, representative_of)
    else:
        out = _table_step(scheduler, base, trajectory, model_output, sample, kwargs, representative_of)
    if run is not None:
        run.advance(trajectory)
    return out


def _trajectory(scheduler, base, timestep, model_output, sample, kwargs) -> Trajectory:
    """The trajectory that this call goes on with, or a new one after `set_timesteps` or a jump."""
    trajectory, eta = scheduler._sage_trajectory, float(kwargs.get("eta") or 0.0)
    if trajectory is not None and trajectory.table is None:
        return trajectory
    index = _row_of(scheduler, timestep)
    if trajectory is None or index != trajectory.index or eta != trajectory.eta:
        trajectory = scheduler._sage_trajectory = Trajectory(scheduler, index, eta)
    reason = trajectory.reason or _outside(model_output, sample, kwargs)
    if reason:
        if trajectory.history:
            raise ValueError(f"{base.__name__}.step: {reason}, but earlier steps of this run went through the table")
        trajectory.table, trajectory.reason = None, reason
        logger.warning(f"{base.__name__} runs its own step, not the fused one: {reason}")
    return trajectory


def _outside(model_output, sample, kwargs) -> str:
    """Why this call's arguments do not fit the table; empty if they do."""
    if sample.dtype not in _KERNEL_DTYPES or model_output.dtype not in _KERNEL_DTYPES:
        return f"sample is {sample.dtype} and model_output {model_output.dtype}; the table takes float32, bfloat16, float16"
    if torch.is_grad_enabled() and (sample.requires_grad or model_output.requires_grad):
        return "a gradient is asked for"
    if model_output.shape != sample.shape:
        return f"model_output {tuple(model_output.shape)} and sample {tuple(sample.shape)} differ in shape"
    try:
        check_step_arguments(**{name: value for name, value in kwargs.items() if name not in ("eta", "variance_noise")})
    except NotInTable as error:
        return str(error)
    return ""


def _row_of(scheduler, timestep) -> int:
    """The table row of `timestep`: diffusers' own step index where the class counts one, else its place in `timesteps`."""
    if hasattr(scheduler, "_init_step_index"):
        if scheduler.step_index is None:
            scheduler._init_step_index(timestep)
        return scheduler.step_index
    if scheduler.num_inference_steps is None:
        raise ValueError(f"{type(scheduler).__name__}.step: num_inference_steps is None; call set_timesteps first")
    found = (scheduler.timesteps == timestep).nonzero()
    if len(found) == 0:
        raise ValueError(f"timestep must be one of scheduler.timesteps, got {timestep}")
    return int(found[0])


def _own_step(scheduler, base, model_output, timestep, sample, kwargs, representative_of):
    """diffusers' own `step` on all rows, between two gathers; untouched when nothing is shared.

    What the scheduler keeps from a step (last samples, last noise, histories) is gathered too: all rows of a node go on as
    its representative.
    """
    if representative_of is None:
        return base.step(scheduler, model_output, timestep, sample, **kwargs)
    out = base.step(scheduler, model_output, timestep, sample.index_select(0, representative_of), **kwargs)

    def gather(value):
        if isinstance(value, list):
            return [gather(item) for item in value]
        kept = torch.is_tensor(value) and value.shape == sample.shape
        return value.index_select(0, representative_of.to(value.device)) if kept else value

    for name, value in list(scheduler.__dict__.items()):
        if torch.is_tensor(value) or isinstance(value, list):
            scheduler.__dict__[name] = gather(value)
    if isinstance(out, tuple):
        return tuple(map(gather, out))
    return type(out)(**{name: gather(value) for name, value in out.items()})


def _table_step(scheduler, base, trajectory: Trajectory, model_output, sample, kwargs, representative_of):
    """One `branch_step` over B rows; every row reads its representative's sample, output, history and noise."""
    if trajectory.dtype is None:
        trajectory.dtype = sample.dtype if sample.dtype == model_output.dtype else torch.float32
    if trajectory.history and trajectory.history[0].shape != sample.shape:
        raise ValueError(
            f"{base.__name__}.step: sample has shape {tuple(sample.shape)}, but the steps before had "
            f"{tuple(trajectory.history[0].shape)}; call set_timesteps before sampling another batch"
        )
    returned = (
        model_output.dtype
        if base.__name__ in _RETURNS_MODEL_DTYPE
        else torch.promote_types(sample.dtype, model_output.dtype)
    )
    device = sample.device
    if representative_of is None:
        parent = torch.arange(len(sample), dtype=torch.int32, device=device)
    else:
        parent = representative_of.to(torch.int32)
    noise = _draw_noise(scheduler, trajectory, model_output, sample, kwargs)
    out = branch_step(
        sample.to(trajectory.dtype),
        model_output,
        trajectory.table.tensor(device),
        trajectory.step_rows(len(sample), device),
        parent,
        history=tuple(trajectory.history),
        last_sample=trajectory.last_sample,
        noise=noise,
        noise_index=None if noise is None else parent,
        want_denoised=trajectory.table.history > 0 or _returns_denoised(base),
        want_corrected=trajectory.table.corrector,
    )
    trajectory.remember(out)
    if hasattr(scheduler, "_step_index"):
        scheduler._step_index += 1
    return _output(base, out.sample.to(returned), out.denoised, kwargs.get("return_dict", True))


def _draw_noise(scheduler, trajectory: Trajectory, model_output, sample, kwargs) -> torch.Tensor | None:
    """The draw that the class's own `step` would make here, [B, ...] float32: same generator, same dtype, same order."""
    if not trajectory.draws[trajectory.index]:
        return None
    noise, device = kwargs.get("variance_noise"), model_output.device
    if noise is None:
        dtype = noise_dtype(scheduler, sample.dtype, model_output.dtype)
        noise = randn_tensor(model_output.shape, generator=kwargs.get("generator"), device=device, dtype=dtype)
    return noise.to(device=device, dtype=torch.float32)


@functools.lru_cache(maxsize=None)
def _output_class(base: type) -> type:
    return getattr(sys.modules[base.__module__], f"{base.__name__}Output", SchedulerOutput)


def _returns_denoised(base: type) -> bool:
    """Whether the class's `step` returns `pred_original_sample` (or its like) beside `prev_sample`."""
    return len(dataclasses.fields(_output_class(base))) > 1


def _output(base: type, prev_sample, denoised, return_dict: bool):
    """What the class's own `step` returns: its output class, or the tuple of that class's fields."""
    cls = _output_class(base)
    values = (prev_sample, denoised)[: len(dataclasses.fields(cls))]
    return cls(*values) if return_dict else values
