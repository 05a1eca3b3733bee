"""The `step` of a `SageScheduler`: one `branch_step` over a coefficient table, or the class's own `step` between two gathers."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor

from sage.solvers import (
    NotInTable,
    check_step_arguments,
    has_schedule,
    noise_draws,
    noise_dtype,
    stock_class,
    table_for,
)
from sage_kernels import branch_step

logger = logging.get_logger(__name__)

# Classes whose own `step` returns x' in the dtype of the model output, of the model output made x0, of the sample, or in
# float32; the others promote sample and model output.
_RETURNS_MODEL_DTYPE = (
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
)
_RETURNS_X0_DTYPE = ("DPMSolverMultistepScheduler",)
_RETURNS_SAMPLE_DTYPE = ("LTXEulerAncestralRFScheduler", "UniPCMultistepScheduler")
_RETURNS_FLOAT32 = ("SCMScheduler",)
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_UNDERSTOOD = ("self", "model_output", "timestep", "sample", "eta", "variance_noise")  # arguments of `step`


class Trajectory:
    """One run through the table: the row we are at, and what the solver remembers (histories and last sample).

    `table` is None where the scheduler's own `step` must run; `reason` then says why.
    """

    def __init__(self, scheduler, index: int, eta: float | None):
        self.index, self.eta = index, eta
        self.history: list[torch.Tensor] = []
        self.last_sample: torch.Tensor | None = None
        self.dtype: torch.dtype | None = None  # of the state: the first sample's, float32 if that is not the model's
        self.table, self.reason = None, ""
        self._steps: torch.Tensor | None = None
        try:
            if not has_schedule(scheduler):
                raise NotInTable("set_timesteps was not called")
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


@functools.lru_cache(maxsize=None)
def _signature(base: type) -> tuple[inspect.Signature, str]:
    """The signature of `base.step`, and its name for the sample.

    Where a subclass only passes `*args, **kwargs` on, the signature is that of the class that it inherits from.
    """
    signatures = (inspect.signature(cls.step) for cls in base.__mro__ if "step" in vars(cls))
    signature = next((found for found in signatures if "model_output" in found.parameters), None)
    names = [] if signature is None else [name for name in signature.parameters if name.startswith("sample")]
    if not names:
        raise TypeError(f"{base.__name__}.step has no parameters model_output and sample; give the subclass those of its base class")
    return signature, names[0]


def shared_step(scheduler, base: type, args: tuple, kwargs: dict):
    """`step` of every `SageScheduler`: one `branch_step`, or the class's own `step` between two gathers.

    Rows of one node are first set to their representative's, then stepped with the representative's noise.
    """
    run = scheduler._sage_run
    signature, name = _signature(base)
    bound = signature.bind(scheduler, *args, **kwargs)
    given = bound.arguments
    model_output, sample = given["model_output"], given.get(name)
    representative_of = None  # int64 [B]
    if run is not None:
        run.before_step(model_output, sample)
        representative_of = run.representative_of(sample.device)
    trajectory = _trajectory(scheduler, base, model_output, sample, given)
    if trajectory.table is None:
        _refuse_branch_noise(run, trajectory)
        out = _own_step(scheduler, base, bound, sample, representative_of)
    else:
        out = _table_step(scheduler, base, trajectory, model_output, sample, given, representative_of)
    if run is not None:
        run.advance(trajectory)
    return out


def _refuse_branch_noise(run, trajectory: Trajectory) -> None:
    if run is not None and run.branch_noise is not None:
        raise NotImplementedError(
            f"branch_noise {run.branch_noise.eta} needs the coefficient table, which this call leaves ({trajectory.reason}); call "
            "without branch_noise, or with a solver and arguments that are in the table"
        )


def _trajectory(scheduler, base, model_output, sample, given) -> Trajectory:
    """The trajectory that this call goes on with, or a new one after `set_timesteps` or a jump."""
    trajectory, eta = scheduler._sage_trajectory, given.get("eta")
    if trajectory is not None and trajectory.table is None:
        return trajectory
    index = _row_of(scheduler, given["timestep"], trajectory) if _may_have_table(scheduler) else 0
    if trajectory is None or index != trajectory.index or eta != trajectory.eta:
        trajectory = scheduler._sage_trajectory = Trajectory(scheduler, index, eta)
    reason = trajectory.reason or _outside(model_output, sample, given)
    if reason:
        if trajectory.history:
            raise ValueError(f"{base.__name__}.step: {reason}, but earlier steps of this run went through the table")
        trajectory.table, trajectory.reason = None, reason
        logger.warning(f"{base.__name__} runs its own step, not the fused one: {reason}")
    return trajectory


def _may_have_table(scheduler) -> bool:
    """Whether the class is in the table and has a schedule; the options are looked at when the table is made."""
    try:
        return has_schedule(scheduler)
    except NotInTable:
        return False


def _outside(model_output, sample, given) -> str:
    """Why this call's arguments do not fit the table; empty if they do."""
    if sample.dtype not in _KERNEL_DTYPES or model_output.dtype not in _KERNEL_DTYPES:
        return f"sample is {sample.dtype} and model_output {model_output.dtype}; the table takes float32, bfloat16, float16"
    if torch.is_grad_enabled() and (sample.requires_grad or model_output.requires_grad):
        return "a gradient is asked for"
    if model_output.shape != sample.shape:
        return f"model_output {tuple(model_output.shape)} and sample {tuple(sample.shape)} differ in shape"
    try:
        check_step_arguments(**{name: value for name, value in given.items() if name not in _UNDERSTOOD})
    except NotInTable as error:
        return str(error)
    return ""


def _row_of(scheduler, timestep, trajectory: Trajectory | None) -> int:
    """The table row of `timestep`: diffusers' own step index where the class counts one, else its place in `timesteps`."""
    if hasattr(scheduler, "_init_step_index"):
        if scheduler.step_index is None:
            scheduler._init_step_index(timestep)
        return scheduler.step_index
    if trajectory is not None and _is_element(timestep, scheduler.timesteps, trajectory.index):
        return trajectory.index
    found = (scheduler.timesteps == timestep).nonzero()
    if len(found) == 0:
        raise ValueError(f"timestep must be one of scheduler.timesteps, got {timestep}")
    return int(found[0])


def _is_element(timestep, timesteps: torch.Tensor, index: int) -> bool:
    """Whether `timestep` is the very element `timesteps[index]`: the same memory, so that no value is read from the device."""
    if not torch.is_tensor(timestep) or timestep.dtype != timesteps.dtype or timestep.device != timesteps.device:
        return False
    return index < len(timesteps) and timestep.numel() == 1 and timestep.data_ptr() == timesteps[index].data_ptr()


def _own_step(scheduler, base, bound: inspect.BoundArguments, sample, representative_of):
    """diffusers' own `step` on all rows, between two gathers; untouched when nothing is shared.

    Every argument that has a row per picture is gathered, and so is what the scheduler keeps from a step (last samples, last
    noise, histories): all rows of a node go on as its representative.
    """
    if representative_of is None:
        return base.step(*bound.args, **bound.kwargs)

    def gather(value):
        if isinstance(value, list):
            return [gather(item) for item in value]
        kept = torch.is_tensor(value) and value.shape == sample.shape
        return value.index_select(0, representative_of.to(value.device)) if kept else value

    for name, value in bound.arguments.items():
        if torch.is_tensor(value) and name != "model_output":  # every row of a node has the same model output
            bound.arguments[name] = gather(value)
    out = base.step(*bound.args, **bound.kwargs)
    for name, value in list(scheduler.__dict__.items()):
        if torch.is_tensor(value) or isinstance(value, list):
            scheduler.__dict__[name] = gather(value)
    if isinstance(out, tuple):
        return tuple(map(gather, out))
    return type(out)(**{name: gather(value) for name, value in out.items()})


def _table_step(scheduler, base, trajectory: Trajectory, model_output, sample, given, representative_of):
    """One `branch_step` over B rows; every row reads its representative's sample, output, history and noise."""
    if trajectory.dtype is None:
        trajectory.dtype = sample.dtype if sample.dtype == model_output.dtype else torch.float32
    if trajectory.history and trajectory.history[0].shape != sample.shape:
        raise ValueError(
            f"{base.__name__}.step: sample has shape {tuple(sample.shape)}, but the steps before had "
            f"{tuple(trajectory.history[0].shape)}; call set_timesteps before sampling another batch"
        )
    stock, table, index, device = stock_class(base), trajectory.table, trajectory.index, sample.device
    if representative_of is None:
        parent = torch.arange(len(sample), dtype=torch.int32, device=device)
    else:
        parent = representative_of.to(torch.int32)
    noise, noise_index = _draw_noise(scheduler, trajectory, model_output, sample, given), parent
    coefficients, step = table.tensor(device), trajectory.step_rows(len(sample), device)
    run = scheduler._sage_run
    if run is not None and run.branch_noise is not None:
        branch, call = run.branch_noise, run.call
        coefficients = branch.coefficients(table, device)
        step = step + len(table) * torch.from_numpy(branch.kinds(call)).to(step)
        noise_index = torch.from_numpy(branch.noise_of(call)).to(parent)
        noise = branch.draw(call, sample) if noise is None else noise
    out = branch_step(
        sample.to(trajectory.dtype).contiguous(),  # a pipeline's loop may hand over views, or channels_last
        model_output.contiguous(),
        coefficients,
        step,
        parent,
        history=tuple(trajectory.history),
        last_sample=trajectory.last_sample,
        noise=noise,
        noise_index=None if noise is None else noise_index,
        want_denoised=table.history > 0 or _returns_denoised(stock),
        want_corrected=table.corrector,
    )
    trajectory.remember(out)
    if hasattr(scheduler, "_step_index"):
        scheduler._step_index += 1
    if hasattr(scheduler, "sigmas_interpol"):  # by this, KDPM2's scale_model_input knows whether a step is half done
        scheduler.sample = out.corrected if table.stage[index] else None
    denoised = out.denoised
    if table.returned is not None:
        x_weight, m_weight = table.returned[index]
        x = sample if representative_of is None else sample.index_select(0, representative_of)
        denoised = torch.add(float(m_weight) * denoised, x, alpha=float(x_weight))
    returned = out.sample.to(_returned_dtype(scheduler, stock, sample.dtype, model_output.dtype))
    return _output(stock, returned, denoised, given.get("return_dict", True))


def _returned_dtype(scheduler, stock: type, sample: torch.dtype, model_output: torch.dtype) -> torch.dtype:
    """The dtype of x' that the class's own `step` returns."""
    name = stock.__name__
    if name in _RETURNS_FLOAT32:
        return torch.float32
    if name in _RETURNS_MODEL_DTYPE or (name in _RETURNS_X0_DTYPE and scheduler.config.prediction_type == "sample"):
        return model_output
    return sample if name in _RETURNS_SAMPLE_DTYPE else torch.promote_types(sample, model_output)


def _draw_noise(scheduler, trajectory: Trajectory, model_output, sample, given) -> torch.Tensor | None:
    """The draw that the class's own `step` would make here, [B, ...] float32: same generator, same dtype, same order."""
    if not trajectory.draws[trajectory.index]:
        return None
    noise, device = given.get("variance_noise"), model_output.device
    if noise is None:
        dtype = noise_dtype(scheduler, sample.dtype, model_output.dtype)
        noise = randn_tensor(model_output.shape, generator=given.get("generator"), device=device, dtype=dtype)
    return noise.to(device=device, dtype=torch.float32)


@functools.lru_cache(maxsize=None)
def _output_class(stock: type) -> type:
    """What the class's own `step` returns: the output class that its module defines, else diffusers' common one."""
    module = vars(sys.modules[stock.__module__])
    own = [v for n, v in module.items() if n.endswith("SchedulerOutput") and v.__module__ == stock.__module__]
    return own[0] if own else SchedulerOutput


def _returns_denoised(stock: type) -> bool:
    """Whether the class's `step` returns `pred_original_sample` (or its like) beside `prev_sample`."""
    return len(dataclasses.fields(_output_class(stock))) > 1


def _output(stock: type, prev_sample, denoised, return_dict: bool):
    """What the class's own `step` returns: its output class, or the tuple of that class's fields."""
    cls = _output_class(stock)
    values = (prev_sample, denoised)[: len(dataclasses.fields(cls))]
    return cls(*values) if return_dict else values
