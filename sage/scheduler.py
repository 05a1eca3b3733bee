"""A drop-in diffusers scheduler whose `step` is one fused `branch_step` over a coefficient table.

Timesteps, sigmas, config and every option stay diffusers' own: a `SageScheduler` **is** the scheduler class that it replaces
(`isinstance` holds, `save_pretrained` writes that class's name, a saved pipeline loads without this package) with `step`
replaced. Where a class or an option does not fit the table, diffusers' own `step` runs instead, bit for bit, and a warning
says why.
"""

from __future__ import annotations

import functools
from typing import Any

from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME, SchedulerMixin

from sage.solvers import SOLVERS
from sage.stepping import Trajectory, shared_step


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
            f"solver {solver!r} is for flow-matching models, but the config's model predicts {config['prediction_type']!r}"
        )


@functools.lru_cache(maxsize=None)
def sage_class(base: type) -> type:
    """The subclass of `base` (a diffusers scheduler class) whose `step` goes through the table.

    It carries `base`'s names, so that configs and saved pipelines name `base`.
    """

    if not hasattr(base, "step"):
        raise TypeError(f"{base.__name__} has no `step`, which SageScheduler replaces; use a scheduler class that has one")

    @functools.wraps(base.step)
    def step(self, *args, **kwargs):
        return shared_step(self, base, args, kwargs)

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
