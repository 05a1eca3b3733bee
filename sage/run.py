"""One shared call of a pipeline: the hooks that reduce the denoiser's rows, and the way through the plan."""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
from contextvars import ContextVar
from typing import Any

import torch
from diffusers.utils import logging

from sage.families import DENOISERS, LATENTS, PlanRows, Rows, map_outputs, map_rows
from sage.plan import SharingPlan
from sage.scheduler import diffusers_class, sage_class
from sage.solvers import NotInTable, table_for

logger = logging.get_logger(__name__)

# The shared call under way in this thread: a denoiser that two pipelines have in common obeys only the one that runs.
_current: ContextVar[Run | None] = ContextVar("sage_run", default=None)

_MOST_ENTRIES = 16  # denoiser calls between two steps: guidance by separate calls, several denoisers, ControlNets
_NO_STEP = (
    "{pipe} runs its denoiser without calling pipe.scheduler.step ({scheduler}): the plan cannot be followed, and members of "
    "a group would come out alike. For a loop of your own use sage.sample"
)


class Run:
    """One pipeline call: where in the plan it is, the hooks that reduce the denoiser's rows, and what they counted."""

    def __init__(self, plan: SharingPlan, pipe, max_rows: int | None, rules: dict[str, str], on_call=None):
        self.plan, self.pipe, self.max_rows, self.rules, self.on_call = plan, pipe, max_rows, rules, on_call
        self.call = 0  # completed calls of scheduler.step
        self.trajectory, self.boundaries = None, None
        self._partitions: PlanRows | None = None
        self._reduced: dict[str, tuple] = {}  # conditions do not change from call to call: reduce them once
        self._inside = False  # the denoiser is being called by a hook, on a chunk
        self._pending: dict[str, list] = {}  # chunks' outputs, by denoiser
        self._entered: list[tuple[str, int]] = []  # (denoiser, guidance copies) since the last step
        self._counted: list[tuple[int, int]] = []  # (rows, guidance copies of each) of every completed call
        self._began = self._ended = 0.0

    @contextlib.contextmanager
    def installed(self):
        """Hooks on the denoisers and the scheduler's class swapped, for the length of a `with` block."""
        scheduler, hooks = self.pipe.scheduler, []
        if scheduler.__dict__.get("_sage_run") is not None:
            raise RuntimeError(
                f"{type(self.pipe).__name__} was called inside a call of a pipeline with the same scheduler object while "
                "sharing is on; give one of them a scheduler of its own (copy.deepcopy)"
            )
        stock_class, token = type(scheduler), _current.set(self)
        try:
            scheduler.__class__ = sage_class(diffusers_class(stock_class))
            scheduler._sage_run = self
            scheduler._sage_trajectory = None
            for name in DENOISERS:
                module = getattr(self.pipe, name, None)
                if isinstance(module, torch.nn.Module):
                    before, after = functools.partial(self._before, name), functools.partial(self._after, name)
                    hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
                    hooks.append(module.register_forward_hook(after))
            yield self
        finally:
            for hook in hooks:
                hook.remove()
            scheduler.__dict__.pop("_sage_run", None)
            scheduler.__dict__.pop("_sage_trajectory", None)
            scheduler.__class__ = stock_class
            _current.reset(token)

    # ---- the plan, as the scheduler and the hooks see it

    @property
    def resolved(self):
        """The `ResolvedPlan`; None before the first denoiser call."""
        return None if self._partitions is None else self._partitions.plan

    def rows(self, timestep: Any = None) -> Rows:
        """The partition at the current call; the plan is resolved at the first."""
        if self._partitions is None:
            begin = _first_row(self.pipe.scheduler, timestep)
            num_calls = len(self.pipe.scheduler.timesteps) - begin
            self.boundaries = _boundaries(self.pipe.scheduler, begin)
            resolved = self.plan.resolve(num_calls, self.boundaries)
            self._partitions = PlanRows(resolved)
        return self._partitions.at(self.call)

    def representative_of(self, device: torch.device) -> torch.Tensor | None:
        """int64 [B]: the row that each row equals at this call; None when every picture has a row of its own."""
        rows = self.rows()
        return None if rows.trivial else rows.representative_of.to(device)

    def advance(self, trajectory) -> None:
        """`scheduler.step` has completed a call."""
        rows, entered = self.rows().num_nodes, self._entered
        self._counted.append((rows, sum(copies for name, copies in entered if name != "controlnet")))
        self._entered = []
        if self.on_call is not None:
            self.on_call(rows, self.resolved.num_calls)
        self.call, self.trajectory, self._ended = self.call + 1, trajectory, time.perf_counter()

    def check_finished(self) -> None:
        """Refuse a call whose pictures would silently be wrong: one that did not go through the plan."""
        if self._partitions is not None and self.call == 0:
            raise RuntimeError(_NO_STEP.format(pipe=type(self.pipe).__name__, scheduler=type(self.pipe.scheduler).__name__))
        if self.resolved is not None and self.call < self.resolved.num_calls and not getattr(self.pipe, "interrupt", False):
            logger.warning(
                f"the plan was resolved for {self.resolved.num_calls} denoiser calls, but the pipeline made {self.call}; "
                "groups that should have parted later did not"
            )

    # ---- the denoiser's hooks

    def _before(self, name: str, module, args: tuple, kwargs: dict):
        """Reduce every batch-shaped argument to one row per node; run all chunks but the last."""
        if _current.get() is not self or self._inside:
            return None
        self._began = self._began or time.perf_counter()
        names = list(inspect.signature(type(getattr(module, "_orig_mod", module)).forward).parameters)[1:]
        given = {**dict(zip(names, args)), **kwargs}
        rows = self.rows(given.get("timestep"))
        batch, copies = self._batch(name, given, rows)
        if not rows.trivial:
            given = {key: self._reduce(key, value, rows, batch, copies) for key, value in given.items()}
        total = copies * rows.num_nodes
        self._entered.append((name, copies))
        if len(self._entered) > _MOST_ENTRIES:
            raise RuntimeError(_NO_STEP.format(pipe=type(self.pipe).__name__, scheduler=type(self.pipe.scheduler).__name__))
        chunk = self.max_rows if self.max_rows is not None and total > self.max_rows else total
        self._pending[name] = []
        for start in range(0, total, chunk):
            part = given if chunk == total else self._slice(given, start, start + chunk, total)
            if start + chunk >= total:
                return tuple(part[n] for n in names[: len(args)]), {key: part[key] for key in kwargs}
            self._inside = True
            try:
                self._pending[name].append(module(*(part[n] for n in names[: len(args)]), **{k: part[k] for k in kwargs}))
            finally:
                self._inside = False

    def _after(self, name: str, module, args: tuple, output):
        """Join the chunks and give every picture its node's row."""
        if _current.get() is not self or self._inside:
            return None
        outputs, rows = [*self._pending.pop(name), output], self.rows()
        if len(outputs) > 1:
            output = map_outputs(outputs, torch.cat)
        if rows.trivial:
            return output
        return map_outputs([output], lambda parts: self._expand(name, parts[0], rows))

    def _expand(self, name: str, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        copies = self._entered[-1][1]
        if len(x) != copies * rows.num_nodes:
            raise ValueError(
                f"{name} returned a tensor of shape {tuple(x.shape)} for {copies * rows.num_nodes} rows: sage does not know "
                "which picture its rows belong to"
            )
        return rows.expand(x, copies)

    def _batch(self, name: str, given: dict, rows: Rows) -> tuple[int, int]:
        """(k·B, k): the rows that the denoiser was called with, and how often each picture stands among them."""
        latents = next((given[key] for key in LATENTS if torch.is_tensor(given.get(key))), None)
        if latents is None:
            raise ValueError(f"{name} was called without a latents argument that sage knows ({', '.join(LATENTS)})")
        copies, rest = divmod(len(latents), rows.num_leaves)
        if rest or copies == 0:
            raise ValueError(
                f"{name} was called with {len(latents)} rows, which is no multiple of the plan's {rows.num_leaves} pictures"
            )
        return len(latents), copies

    def _reduce(self, key: str, value: Any, rows: Rows, batch: int, copies: int) -> Any:
        if key in LATENTS or not torch.is_tensor(value):
            return map_rows(key, value, batch, self.rules, lambda x, how: getattr(rows, how)(x, copies))
        last = self._reduced.get(key)
        if last is None or last[0] is not value or last[1:3] != (value._version, rows):
            reduced = map_rows(key, value, batch, self.rules, lambda x, how: getattr(rows, how)(x, copies))
            last = self._reduced[key] = (value, value._version, rows, reduced)
        return last[3]

    def _slice(self, given: dict, start: int, stop: int, total: int) -> dict:
        return {key: map_rows(key, value, total, self.rules, lambda x, how: x[start:stop]) for key, value in given.items()}

    def stats(self) -> dict[str, Any]:
        """See `Sharing.stats`."""
        nfe, independent = sum(rows for rows, _ in self._counted), len(self._counted) * len(self.plan.leaves)
        in_table = self.trajectory is not None and self.trajectory.table is not None
        return {
            "nfe": nfe,
            "nfe_independent": independent,
            "saving": 1 - nfe / independent if independent else 0.0,
            "guidance_copies": max((copies for _, copies in self._counted), default=1),
            "denoiser_rows": sum(rows * copies for rows, copies in self._counted),
            "rows": [rows for rows, _ in self._counted],
            "num_calls": len(self._counted),
            "boundaries": self.boundaries,
            "denoise_seconds": self._ended - self._began,
            "solver_path": "table" if in_table else f"own step: {getattr(self.trajectory, 'reason', 'no step was taken')}",
        }


def _first_row(scheduler, timestep: Any) -> int:
    """The row of `scheduler.timesteps` at which this loop begins (img2img and refiners skip the first ones)."""
    if hasattr(scheduler, "begin_index"):
        return scheduler.begin_index or 0
    found = (scheduler.timesteps == timestep).nonzero() if timestep is not None else []
    return int(found[0]) if len(found) else 0


def _boundaries(scheduler, begin: int) -> list[bool] | None:
    """Per denoiser call, whether a group may part after it; None where it may after every one."""
    if getattr(scheduler, "order", 1) == 1:
        return None
    try:
        return [stage == 0 for stage in table_for(scheduler, begin=begin).stage[begin:]]
    except NotInTable:
        return None
