"""Turn sharing on in an unmodified diffusers pipeline: one line, undone exactly.

    with sage.enable(pipe, share=0.4) as sharing:
        images = pipe(prompts).images
    print(sharing.stats)

Nothing in the pipeline's loop changes: it goes on seeing one row per picture. During a call a hook on the denoiser reduces
the rows of every argument to one per node of the plan, runs the denoiser on those, and gives every picture its node's row
back; the scheduler's `step` keeps the rows of a node equal. Both are installed when a call begins and gone when it ends,
however it ends, so between calls the pipeline differs from a stock one only by its (sub)class.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging

from sage.embed import embed_prompts
from sage.families import DENOISERS, LATENTS, PlanRows, Rows, check_rules, map_outputs, map_rows
from sage.grouping import plan_prompts
from sage.plan import SharingPlan
from sage.scheduler import diffusers_class, sage_class
from sage.solvers import NotInTable, table_for

logger = logging.get_logger(__name__)

# The shared call under way in this thread: a denoiser that two pipelines have in common obeys only the one that runs.
_current: ContextVar[Run | None] = ContextVar("sage_run", default=None)


def enable(
    pipe: DiffusionPipeline,
    plan: SharingPlan | None = None,
    *,
    share: float = 0.4,
    similarity: float = 0.6,
    max_group_size: int = 8,
    encoder: str = "auto",
    max_rows: int | None = None,
    rules: Mapping[str, str] | None = None,
) -> Sharing:
    """Let the early denoising steps of similar prompts run once, in every later call of `pipe`.

    Args:
        pipe: any diffusers pipeline whose denoiser is one of `sage.families.DENOISERS`. Enabling it again replaces the
            former settings.
        plan: which pictures share, and for how long; None plans each call from its own prompts with the arguments below.
        share: β in [0, 1], the fraction of the denoiser calls that a group runs as one row.
        similarity: τ in (−1, 1]: prompts are grouped where every pair has at least this cosine.
        max_group_size: the most prompts in a group.
        encoder: what embeds the prompts for grouping: "auto" (the sentence encoder that ships), "pipeline" (the pipeline's
            own pooled text encoder), or a name or folder of a sentence encoder.
        max_rows: the most rows (guidance copies counted) that the denoiser is given at once; None: no limit.
        rules: additions to `sage.families.RULES`, for denoisers with arguments of their own.

    Returns:
        The `Sharing` handle: a context manager, with `.stats`, `.plan` and `.disable()`.

    Raises:
        TypeError: `pipe` is no diffusers pipeline. ValueError: an argument out of range.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(f"pipe must be a diffusers pipeline, got {type(pipe).__name__}; for a loop of your own use sage.sample")
    if not any(isinstance(getattr(pipe, name, None), torch.nn.Module) for name in DENOISERS):
        raise TypeError(f"{type(pipe).__name__} has no denoiser that sage knows (looked for {', '.join(DENOISERS)})")
    if plan is not None and not isinstance(plan, SharingPlan):
        raise TypeError(f"plan must be a sage.SharingPlan or None, got {type(plan).__name__}")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be at least 1 or None, got {max_rows}")
    disable(pipe)
    options = dict(share=share, similarity=similarity, max_group_size=max_group_size)
    return Sharing(pipe, plan, options, encoder, max_rows, check_rules(rules))


def disable(pipe: DiffusionPipeline) -> None:
    """Undo `enable`; does nothing to a pipeline on which sharing is off."""
    sharing = pipe.__dict__.get("_sage_sharing")
    if sharing is not None:
        sharing.disable()


class Sharing:
    """The handle that `enable` returns.

    Attributes:
        plan: the `SharingPlan` of the last call (or the one that was passed in).
        stats: what the last call did: `nfe` (denoiser rows evaluated, guidance copies not counted), `nfe_independent`,
            `saving`, `guidance_copies`, `rows` (per denoiser call), `num_calls`, `denoise_seconds`, `seconds`, `solver_path`.
        on_call: called after each denoiser call with (rows evaluated, number of calls); for progress bars.
    """

    def __init__(self, pipe, plan, options: dict, encoder: str, max_rows: int | None, rules: dict[str, str]):
        check_options(**options)
        self.pipe, self.plan, self.stats = pipe, plan, {}
        self.on_call: Callable[[int, int], None] | None = None
        self._fixed_plan, self._options, self._encoder = plan, options, encoder
        self._max_rows, self._rules = max_rows, rules
        pipe._sage_sharing = self
        pipe.__class__ = _sharing_class(type(pipe))

    def disable(self) -> None:
        """Give the pipeline back as it was."""
        if self.pipe.__dict__.get("_sage_sharing") is self:
            del self.pipe.__dict__["_sage_sharing"]
            self.pipe.__class__ = type(self.pipe).__mro__[1]

    def __enter__(self) -> Sharing:
        return self

    def __exit__(self, *exc_info) -> None:
        self.disable()

    def call(self, base_call: Callable, args: tuple, kwargs: dict) -> Any:
        """One call of the pipeline under a plan."""
        given = inspect.signature(base_call).bind_partial(self.pipe, *args, **kwargs)
        given.apply_defaults()
        self.plan = self._plan_call(given.arguments)
        run = Run(self.plan, self.pipe, self._max_rows, self._rules, self.on_call)
        start = time.perf_counter()
        with run.installed():
            result = base_call(self.pipe, *args, **kwargs)
        self.stats = {**run.stats(), "seconds": time.perf_counter() - start}
        return result

    def _plan_call(self, given: Mapping[str, Any]) -> SharingPlan:
        """The plan of one call: the fixed one, checked against the call, or a new one from the call's prompts."""
        prompts, images = given.get("prompt"), given.get("num_images_per_prompt") or 1
        prompts = [prompts] if isinstance(prompts, str) else prompts
        plan = self._fixed_plan
        if plan is None:
            return self._plan_prompts(prompts, images)
        if prompts is not None:
            asked = [prompt for prompt in prompts for _ in range(images)]
            planned = [leaf.prompt for leaf in plan.leaves]
            if asked != planned:
                raise ValueError(mismatch(asked, planned))
        elif given.get("prompt_embeds") is not None and len(given["prompt_embeds"]) * images != len(plan.leaves):
            count = len(given["prompt_embeds"]) * images
            raise ValueError(f"plan is for {len(plan.leaves)} pictures, but the call asks for {count}")
        return plan

    def _plan_prompts(self, prompts: list[str] | None, images: int) -> SharingPlan:
        if prompts is None:
            raise ValueError("the call gives prompt_embeds and no prompt: there is no text to group by; pass plan= to sage.enable")
        last = self.plan
        if last is not None and [leaf.prompt for leaf in last.leaves] == [p for p in prompts for _ in range(images)]:
            return last
        embeddings = embed_prompts(prompts, encoder=self._encoder, pipe=self.pipe)
        return plan_prompts(prompts, embeddings, images_per_prompt=images, **self._options)


def check_options(share: float, similarity: float, max_group_size: int) -> None:
    """Refuse grouping options out of range, before any prompt is embedded.

    Raises:
        ValueError: see `enable` for the ranges.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share}")
    if not -1 < similarity <= 1:
        raise ValueError(f"similarity must lie in (-1, 1], got {similarity}")
    if max_group_size < 1:
        raise ValueError(f"max_group_size must be at least 1, got {max_group_size}")


def mismatch(asked: list[str], planned: list[str]) -> str:
    """How the prompts of a call differ from those that a plan was made for."""
    if len(asked) != len(planned):
        return f"plan is for {len(planned)} pictures, but the call asks for {len(asked)} (prompts × num_images_per_prompt)"
    i = next(i for i, (a, p) in enumerate(zip(asked, planned)) if a != p)
    return f"plan was made for other prompts: picture {i} is planned as {planned[i]!r}, but the call asks for {asked[i]!r}"


@functools.lru_cache(maxsize=None)
def _sharing_class(base: type) -> type:
    """The subclass of a pipeline class whose calls go through `Sharing.call`; it carries `base`'s names."""

    @functools.wraps(base.__call__)
    def __call__(self, *args, **kwargs):
        return self._sage_sharing.call(base.__call__, args, kwargs)

    namespace = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__call__": __call__,
    }
    return type(base.__name__, (base,), namespace)


class Run:
    """One pipeline call: where in the plan it is, the hooks that reduce the denoiser's rows, and what they counted."""

    def __init__(self, plan: SharingPlan, pipe, max_rows: int | None, rules: dict[str, str], on_call=None):
        self.plan, self.pipe, self.max_rows, self.rules, self.on_call = plan, pipe, max_rows, rules, on_call
        self.call = 0  # completed calls of scheduler.step
        self.trajectory = None
        self._partitions: PlanRows | None = None
        self._reduced: dict[tuple, tuple] = {}  # conditions do not change from call to call: reduce them once
        self._inside = False  # the denoiser is being called by a hook, on a chunk
        self._pending: dict[str, list] = {}  # chunks' outputs, by denoiser
        self._counted: list[int] = []  # denoiser rows of each call, guidance copies included
        self._copies = 1
        self._began = self._ended = 0.0

    @contextlib.contextmanager
    def installed(self):
        """Hooks on the denoisers and the scheduler's class swapped, for the length of a `with` block."""
        scheduler, hooks, token = self.pipe.scheduler, [], _current.set(self)
        stock_class = type(scheduler)
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

    def rows(self, timestep: Any = None) -> Rows:
        """The partition at the current call; the plan is resolved at the first."""
        if self._partitions is None:
            begin = _first_row(self.pipe.scheduler, timestep)
            num_calls = len(self.pipe.scheduler.timesteps) - begin
            resolved = self.plan.resolve(num_calls, _boundaries(self.pipe.scheduler, begin))
            self._partitions = PlanRows(resolved)
        return self._partitions.at(self.call)

    def representative_of(self, device: torch.device) -> torch.Tensor | None:
        """int64 [B]: the row that each row equals at this call; None when every picture has a row of its own."""
        rows = self.rows()
        return None if rows.trivial else rows.representative_of.to(device)

    def advance(self, trajectory) -> None:
        """`scheduler.step` has completed a call."""
        if self.on_call is not None:
            self.on_call(self.rows().num_nodes, self._partitions.plan.num_calls)
        self.call, self.trajectory, self._ended = self.call + 1, trajectory, time.perf_counter()

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
        self._count(name, total, copies)
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
        return map_outputs([output], lambda parts: self._expand(parts[0], rows))

    def _expand(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        copies, rest = divmod(len(x), rows.num_nodes)
        return x if rest else rows.expand(x, copies)

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
        memo = (key, id(value), value._version, id(rows))
        if memo not in self._reduced:  # the value is kept with its reduction: its id stays its own
            reduced = map_rows(key, value, batch, self.rules, lambda x, how: getattr(rows, how)(x, copies))
            self._reduced[memo] = (value, reduced)
        return self._reduced[memo][1]

    def _slice(self, given: dict, start: int, stop: int, total: int) -> dict:
        return {key: map_rows(key, value, total, self.rules, lambda x, how: x[start:stop]) for key, value in given.items()}

    def _count(self, name: str, total: int, copies: int) -> None:
        if name == "controlnet":
            return
        while len(self._counted) <= self.call:
            self._counted.append(0)
        self._counted[self.call] += total
        self._copies = max(self._copies, self._counted[self.call] // self.rows().num_nodes)

    def stats(self) -> dict[str, Any]:
        """See `Sharing.stats`."""
        independent = len(self._counted) * len(self.plan.leaves)
        nfe = sum(self._counted) / self._copies
        nfe = int(nfe) if nfe == int(nfe) else nfe
        in_table = self.trajectory is not None and self.trajectory.table is not None
        return {
            "nfe": nfe,
            "nfe_independent": independent,
            "saving": 1 - nfe / independent if independent else 0.0,
            "guidance_copies": self._copies,
            "rows": [count // self._copies for count in self._counted],
            "num_calls": len(self._counted),
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
