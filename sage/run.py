"""One shared call of a pipeline: the way through the plan, and what the denoiser and the scheduler do at each call."""

from __future__ import annotations

import contextlib
import inspect
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers.utils import logging

from sage.branch_noise import BranchNoise
from sage.caches import Caches
from sage.clock import now
from sage.denoiser import Arguments, Interception, Launcher, Reducer, current, denoisers_of, is_static
from sage.families import ADAPTERS, DENOISERS, UNSHARED
from sage.plan import SharingPlan
from sage.probe import Course, Probe, Probed
from sage.rows import PlanRows, Rows, map_outputs
from sage.scheduler import diffusers_class, sage_class
from sage.solvers import NotInTable, table_for
from sage.watch import FirstStep
from sage_kernels.coefficients import branch_rows

logger = logging.get_logger(__name__)

_swapping = threading.Lock()
_MOST_ENTRIES = 16  # denoiser calls between two steps: guidance by separate calls, several denoisers, ControlNets
_NO_STEP = (
    "{pipe} runs its denoiser without calling pipe.scheduler.step ({scheduler}): the plan cannot be followed, and members of "
    "a group would come out alike. For a loop of your own use sage.sample"
)


class Run:
    """One pipeline call: where in the plan it is, what it does to denoiser and scheduler, and what it counted.

    Args:
        max_rows: the most rows (guidance copies counted) of one denoiser call; halved when memory runs out.
        eta: strength of the noise that members get as they part.
        generators: what the pipeline's call was given, for that noise.
        probe: parts groups early; None: as the plan says.

    Attributes:
        branch_noise: None without such noise, and before the first denoiser call.
    """

    def __init__(
        self,
        plan: SharingPlan,
        pipe,
        max_rows: int | None,
        rules: dict[str, str],
        on_call=None,
        eta: float = 0.0,
        generators=None,
        probe: Probe | None = None,
    ):
        self.plan, self.pipe, self.on_call = plan, pipe, on_call
        self.code = inspect.unwrap(type(pipe).__call__).__code__  # of the pipeline's own call
        self._eta, self._generators, self.branch_noise = eta, generators, None
        self.call = 0  # completed calls of scheduler.step
        self.trajectory, self.boundaries = None, None
        self._rules, self._reduce = rules, Reducer(rules)
        self._partitions: PlanRows | None = None
        self._probe, self._course, self._probed = probe, None, None  # the last: the rows of the call under way, if it is probed
        self._first_step: FirstStep | None = None
        self._denoisers: dict[int, str] = {}  # id of the module → its name
        self._entered: list[tuple[str, int]] = []  # (denoiser, guidance copies) since the last step
        self._counted: list[tuple[int, int]] = []  # (rows, guidance copies of each) of every completed call
        self._launcher, self._copies_per_launch = Launcher(max_rows, rules), 1
        self._caches = Caches()
        self._device = torch.device("cpu")  # of the latents, once they are seen
        self._began = self._ended = 0.0

    @contextlib.contextmanager
    def installed(self) -> Iterator[Run]:
        """The denoisers' calls intercepted and the scheduler's class swapped, for the length of a `with` block."""
        with contextlib.ExitStack() as undo:
            undo.callback(current.reset, current.set(self))
            num_timesteps = self.pipe.__dict__.pop("_num_timesteps", None)  # the last call's
            if num_timesteps is not None:
                undo.callback(self.pipe.__dict__.setdefault, "_num_timesteps", num_timesteps)
            self._take_scheduler(self.pipe.scheduler, undo)
            denoisers = denoisers_of(self.pipe)
            for name, module in denoisers.items():
                undo.callback(Interception.install(module).remove)
                self._denoisers[id(module)] = name
            undo.enter_context(self._caches.installed(list(denoisers.values())))
            yield self

    def _take_scheduler(self, scheduler, undo: contextlib.ExitStack) -> None:
        """Swap the scheduler's class, if no other shared call has it; `undo` gives it back.

        Raises:
            RuntimeError: another call has it, or its `step` is not its class's.
        """
        with _swapping:
            if "_sage_run" in scheduler.__dict__:
                raise RuntimeError(
                    f"{type(self.pipe).__name__} was called while a shared call on the same scheduler object is under way (inside a "
                    "callback of it, or in another thread); give one of them a scheduler of its own (copy.deepcopy)"
                )
            if "step" in scheduler.__dict__:
                raise RuntimeError(
                    f"{type(scheduler).__name__}.step was replaced on this object, where sage cannot follow the plan; override it in a "
                    "subclass"
                )
            undo.callback(self._give_back, scheduler, type(scheduler))
            scheduler.__class__ = sage_class(diffusers_class(type(scheduler)))
            scheduler._sage_run, scheduler._sage_trajectory = self, None

    @staticmethod
    def _give_back(scheduler, cls: type) -> None:
        with _swapping:
            scheduler.__class__ = cls
            scheduler.__dict__.pop("_sage_trajectory", None)
            scheduler.__dict__.pop("_sage_run", None)

    def name_of(self, module: torch.nn.Module) -> str | None:
        """The pipeline's attribute that holds a denoiser; None for another pipeline's."""
        return self._denoisers.get(id(module))

    # ---- the plan, as the scheduler and the denoiser see it

    @property
    def resolved(self):
        """The `ResolvedPlan`; None before the first denoiser call."""
        return None if self._partitions is None else self._partitions.plan

    def rows(self, timestep: Any = None) -> Rows:
        """The partition at the current call; the plan is resolved at the first."""
        if self._partitions is None:
            begin = _first_row(self.pipe.scheduler, timestep)
            # What the loop says it will do, else the rest of the schedule (denoising_end stops before that is over).
            num_calls = self.pipe.__dict__.get("_num_timesteps") or len(self.pipe.scheduler.timesteps) - begin
            boundaries = _boundaries(self.pipe.scheduler, begin)
            self.boundaries = None if boundaries is None else boundaries[:num_calls]
            self._partitions = PlanRows(self.plan.resolve(num_calls, self.boundaries))
            if self.resolved.saving > 0 and type(self.pipe).__name__.startswith(UNSHARED):
                raise ValueError(
                    f"{type(self.pipe).__name__} reads what its denoiser's layers left behind, a row for every picture: it cannot share; "
                    "use share=0"
                )
            if self._eta > 0:
                self._check_branch_noise(begin)
                self.branch_noise = BranchNoise(self.resolved, self._eta, self._generators)
            if self._probe is not None:
                self._course = Course(self._probe, self.resolved, self.boundaries)
            first = self._partitions.at(0)
            self._first_step = None if first.trivial else FirstStep(first, self._rules)
        return self._partitions.at(self.call)

    def _check_branch_noise(self, begin: int) -> None:
        """Refuse a scheduler whose steps have no stochastic form."""
        try:
            branch_rows(table_for(self.pipe.scheduler, begin=begin), self._eta)
        except NotImplementedError as error:
            raise NotImplementedError(
                f"branch_noise {self._eta} has no form for this scheduler: {error}; call without branch_noise, or with another solver"
            ) from error

    def representative_of(self, device: torch.device) -> torch.Tensor | None:
        """int64 [B]: the row that each row equals at this call; None when every picture has a row of its own."""
        rows = self.rows()
        return None if rows.trivial else rows.representative_rows(device)

    def before_step(self, model_output: torch.Tensor, sample: torch.Tensor) -> None:
        """`scheduler.step` begins; refuse a loop that sharing would get wrong.

        Raises:
            ValueError: rows that are not the plan's pictures, or not in their order (see `sage.watch`).
            RuntimeError: the denoiser was not called since the last step.
        """
        name = type(self.pipe.scheduler).__name__
        if len(sample) != len(self.plan.leaves):
            raise ValueError(
                f"{name}.step: sample has {len(sample)} rows, but the plan has {len(self.plan.leaves)} pictures; "
                "sharing needs one row per picture in the scheduler's step"
            )
        if not self._entered and self.resolved is not None and self.resolved.saving > 0:
            raise RuntimeError(
                f"{name}.step was called {self.call + 1} times, but {type(self.pipe).__name__} called no denoiser of "
                f"{', '.join(DENOISERS)} since the last: the plan counts one step per denoiser call"
            )
        if self._first_step is not None and self._first_step.check(model_output, sample):
            self._first_step = None

    def advance(self, trajectory) -> None:
        """`scheduler.step` has completed a call."""
        rows, entered = (self._probed or self.rows()).num_nodes, self._entered
        if self._first_step is not None and self.resolved.branches_after(self.call):
            self._first_step = None
        self._counted.append((rows, sum(copies for name, copies in entered if name not in ADAPTERS)))
        self._entered, self._probed = [], None
        if self.on_call is not None:
            self.on_call(rows, self.resolved.num_calls)
        self.call, self.trajectory = self.call + 1, trajectory
        last = self.call == self.resolved.num_calls
        self._ended = now(self._device) if last else time.perf_counter()  # the device is waited for once, at the end

    def check_finished(self) -> None:
        """Refuse a call whose pictures would silently be wrong: one that did not go through the plan."""
        if self._partitions is not None and self.call == 0:
            raise RuntimeError(_NO_STEP.format(pipe=type(self.pipe).__name__, scheduler=type(self.pipe.scheduler).__name__))
        if self.resolved is not None and self.call < self.resolved.num_calls and not getattr(self.pipe, "interrupt", False):
            logger.warning(
                f"the plan was resolved for {self.resolved.num_calls} denoiser calls, but the pipeline made {self.call}; "
                "groups that should have parted later did not"
            )

    # ---- the denoiser's call

    def denoise(self, name: str, interception: Interception, args: tuple, kwargs: dict) -> Any:
        """What the pipeline gets for calling its denoiser: B rows in, R rows computed, B rows out."""
        arguments = Arguments(interception.module, args, kwargs)
        rows = self.rows(arguments.given.get("timestep"))
        latents = arguments.latents(name)
        batch, copies = len(latents), self._copies(name, len(latents), rows)
        if not self._began:
            self._device = latents[0].device
            self._began = now(self._device)
        self._entered.append((name, copies))
        self._copies_per_launch = max(self._copies_per_launch, copies)
        if len(self._entered) > _MOST_ENTRIES:
            raise RuntimeError(_NO_STEP.format(pipe=type(self.pipe).__name__, scheduler=type(self.pipe.scheduler).__name__))
        if self._course is not None and self._course.calls:
            self._check_probe(name, interception.module)
            self._probed = self._course.at(self.call)
            rows = self._probed or rows
        given = arguments.given
        if not rows.trivial:
            if self._first_step is not None:
                self._first_step.saw(name, latents)
            given = self._reduce(name, given, rows, batch, copies, check=self._first_step is not None)
        self._caches.carry(interception.module, rows, copies, self.resolved.saving > 0)
        output = self._launch(interception, arguments, given, rows.num_nodes, copies, isinstance(latents, list))
        if rows.trivial:
            return output
        if self._probed is not None:
            self._decide(name, self._probed, output, latents, copies)
        return map_outputs([output], lambda parts: self._expand(name, parts[0], rows, copies), isinstance(latents, list))

    def _check_probe(self, name: str, module: torch.nn.Module) -> None:
        """Refuse loops in which one denoiser call does not tell what a row predicts.

        Raises:
            ValueError: a cache, or a second call of a denoiser in one step; at the latest in the first step, which is never probed.
        """
        pipe = type(self.pipe).__name__
        if self._caches.hold(module):
            raise ValueError(
                f"probe needs a denoiser without a cache, got {name} of {pipe} with one: what it skips is decided by what it remembers, "
                "and members have nothing to remember; disable the cache (disable_cache), or call without probe"
            )
        if self._entered[:-1]:
            calls = " and ".join(entered for entered, _ in self._entered)
            raise ValueError(
                f"probe needs a loop with one denoiser call per step, guidance copies in one batch, got {calls} in one step of {pipe}: the "
                'first would be made before it is known which groups part; call without probe, or try sage.generate with engine="native"'
            )

    def _decide(self, name: str, probed: Probed, output: Any, latents: Any, copies: int) -> None:
        """Compare the rows of a probed call; from here on, this call's step included, what parts has rows of its own."""
        prediction = _prediction(output, latents)
        if len(prediction) != copies * probed.num_nodes:
            raise ValueError(f"{name} returned {tuple(prediction.shape)} for {copies * probed.num_nodes} rows, which cannot be compared")
        if self._course.decide(self.call, probed, prediction, copies):
            self._partitions, self._first_step = PlanRows(self._course.plan), None

    def _launch(self, interception: Interception, arguments: Arguments, given: dict, num_nodes: int, copies: int, row_lists: bool):
        """Run k·R rows through the denoiser, in pieces that fit."""

        def call(piece: dict) -> Any:
            args, kwargs = arguments.passed(piece)
            return interception.stock(*args, **kwargs)

        if self._caches.hold(interception.module):
            return self._caches.launch(self._launcher, call, given, copies * num_nodes)
        pad_to = len(self.plan.leaves) if is_static(interception.module, interception.compiled) else 0
        return self._launcher(call, given, num_nodes, copies, pad_to, row_lists)

    def _expand(self, name: str, x: Any, rows: Rows, copies: int) -> Any:
        if len(x) != copies * rows.num_nodes:
            shape = tuple(x.shape) if torch.is_tensor(x) else f"a list of {len(x)}"
            raise ValueError(
                f"{name} returned {shape} for {copies * rows.num_nodes} rows: sage does not know which picture its rows belong to"
            )
        return rows.expand(x, copies)

    def _copies(self, name: str, batch: int, rows: Rows) -> int:
        """k: how often each picture stands among the rows that the denoiser was called with."""
        copies, rest = divmod(batch, rows.num_leaves)
        if rest or copies == 0:
            raise ValueError(f"{name} was called with {batch} rows, which is no multiple of the plan's {rows.num_leaves} pictures")
        return copies

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
            "launches": self._launcher.launches,
            "copies_per_launch": self._copies_per_launch,
            "max_rows": self._launcher.max_rows,
            "boundaries": self.boundaries,
            "cache": self._caches.stats(),
            "probes": None if self._probe is None else self._course.records if self._course is not None else [],
            "denoise_seconds": self._ended - self._began,
            "solver_path": "table" if in_table else f"own step: {getattr(self.trajectory, 'reason', 'no step was taken')}",
        }


def _prediction(output: Any, latents: Any) -> torch.Tensor:
    """What a denoiser predicts, [rows, ...]: its first output, without the variance that some give in as many channels more."""
    while not torch.is_tensor(output):
        first = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
        output = torch.stack(output) if isinstance(output, list) and torch.is_tensor(first) and isinstance(latents, list) else first
    channels = output.shape[1] // 2 if output.ndim > 1 else 0
    learned = torch.is_tensor(latents) and output.ndim == latents.ndim and channels == latents.shape[1]
    return output[:, :channels] if learned else output


def _first_row(scheduler, timestep: Any) -> int:
    """The row of `scheduler.timesteps` at which this loop begins (img2img and refiners skip the first ones)."""
    if hasattr(scheduler, "begin_index"):
        return scheduler.begin_index or 0
    if timestep is None:
        return 0
    found = (scheduler.timesteps == torch.as_tensor(timestep).flatten()[0].to(scheduler.timesteps.device)).nonzero()
    return int(found[0]) if len(found) else 0


def _boundaries(scheduler, begin: int) -> list[bool] | None:
    """Per denoiser call, whether a group may part after it; None where it may after every one."""
    try:
        stage = table_for(scheduler, begin=begin).stage[begin:]
    except NotInTable:
        return None
    return [bool(number == 0) for number in stage] if any(stage) else None
