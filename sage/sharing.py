"""Turn sharing on in an unmodified diffusers pipeline: one line, undone exactly.

    with sage.enable(pipe, share=0.4) as sharing:
        images = pipe(prompts).images
    print(sharing.stats)

Nothing in the pipeline's loop changes: it goes on seeing one row per picture. During a call, what stands in front of the denoiser
reduces the rows of every argument to one per node of the plan, runs the denoiser on those, and gives every picture its node's row
back; the scheduler's `step` keeps the rows of a node equal. Both are installed when a call begins and gone when it ends, however
it ends, so between calls the pipeline differs from a stock one only by its (sub)class.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Mapping
from typing import Any

from diffusers import DiffusionPipeline

from sage.adapters import usual_share
from sage.denoiser import denoisers_of
from sage.embed import embed_prompts
from sage.families import DENOISERS, check_rules
from sage.plan import SharingPlan
from sage.plan_checks import fraction, integer, threshold
from sage.probe import Probe
from sage.request import Request
from sage.run import Run
from sage.sampling_checks import check_probe


def enable(
    pipe: DiffusionPipeline,
    plan: SharingPlan | None = None,
    *,
    share: float | None = None,
    similarity: float = 0.6,
    max_group_size: int = 8,
    encoder: str = "auto",
    max_rows: int | None = None,
    branch_noise: float = 0.0,
    probe: Probe | None = None,
    rules: Mapping[str, str] | None = None,
) -> Sharing:
    """Let the early denoising steps of similar prompts run once, in every later call of `pipe`.

    Args:
        pipe: any diffusers pipeline whose denoiser is one of `sage.families.DENOISERS`. Enabling it again replaces the
            former settings.
        plan: which pictures share, and for how long; None plans each call from its own prompts with the arguments below.
        share: β in [0, 1], the fraction of the denoiser calls that a group runs as one row; None: what the adapter of
            `sage.load_adapter` was trained for, 0.4 without one.
        similarity: τ in (−1, 1]: prompts are grouped where every pair has at least this cosine.
        max_group_size: the most prompts in a group.
        encoder: what embeds the prompts for grouping: "auto" (the sentence encoder that ships), "pipeline" (the pipeline's
            own pooled text encoder), or a name or folder of a sentence encoder.
        max_rows: the most rows (guidance copies counted) that the denoiser is given at once; None: no limit.
        branch_noise: η in [0, 1]: where a group parts, its members take the stochastic form of that step, of this strength and
            each with noise of its own, for more diverse pictures at the same cost; see `sage.sample`. It is drawn from a clone
            of each picture's generator, which itself ends where it would without.
        probe: at some calls the denoiser is also given what every group is to part into, and a group whose members predict otherwise
            than it does parts at once, see `sage.Probe`. Its rows are counted in the stats, under `probes` too. For pipelines whose
            step calls one denoiser once, with guidance in one batch, and no cache: for others a later call raises ValueError, in its
            first step if that is like the rest. Where a loop gives members latents of their own (inpainting, outside the mask) a
            child is given its own.
        rules: additions to `sage.families.RULES`, for denoisers with arguments of their own.

    Returns:
        The `Sharing` handle: a context manager, with `.stats`, `.plan` and `.disable()`.

    Raises:
        TypeError: `pipe` is no diffusers pipeline, or `probe` no `sage.Probe`. ValueError: an argument out of range, or `probe` beside
            `branch_noise`. A later call raises NotImplementedError where its scheduler has no form for `branch_noise`.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(f"pipe must be a diffusers pipeline, got {type(pipe).__name__}; for a loop of your own use sage.sample")
    if not denoisers_of(pipe):
        raise TypeError(f"{type(pipe).__name__} has no denoiser that sage knows (looked for {', '.join(DENOISERS)})")
    if plan is not None and not isinstance(plan, SharingPlan):
        raise TypeError(f"plan must be a sage.SharingPlan or None, got {type(plan).__name__}")
    share = usual_share(pipe, share)
    check_grouping(share, similarity, max_group_size, max_rows)
    branch_noise = fraction(branch_noise, "branch_noise")
    check_probe(probe, branch_noise)
    rules = check_rules(rules)
    disable(pipe)
    options = dict(share=share, similarity=similarity, max_group_size=max_group_size)
    return Sharing(pipe, plan, options, encoder, max_rows, rules, branch_noise, probe)


def disable(pipe: DiffusionPipeline) -> None:
    """Undo `enable`; does nothing to a pipeline on which sharing is off."""
    sharing = pipe.__dict__.get("_sage_sharing")
    if sharing is not None:
        sharing.disable()


class Sharing:
    """The handle that `enable` returns.

    Attributes:
        plan: the `SharingPlan` of the last call (or the one that was passed in).
        resolved: the `ResolvedPlan` that the last call followed.
        stats: what the last call did: `nfe` (denoiser rows evaluated, guidance copies not counted), `nfe_independent`,
            `saving`, `guidance_copies` (the most per row), `denoiser_rows` (with guidance copies), `rows` (per denoiser
            call), `num_calls`, `launches` (denoiser calls really made, ControlNets included), `copies_per_launch`
            (guidance copies in one call), `max_rows` (halved if memory ran out), `boundaries` (per call, whether a group might
            part after it; None: after any), `cache` (None, or the `name` of what skips blocks and the fraction `computed`: those
            blocks cost (1 − saving) · computed), `probes` (None without a probe; else a dict per probe made, see
            `sage.probe.Course.records`: their rows are in `nfe`, `rows` and `saving`), `denoise_seconds`, `seconds`, `solver_path`.
        on_call: called after each denoiser call with (rows evaluated, number of calls); for progress bars.
    """

    def __init__(
        self,
        pipe,
        plan,
        options: dict,
        encoder: str,
        max_rows: int | None,
        rules: dict[str, str],
        branch_noise: float,
        probe: Probe | None,
    ):
        self.pipe, self.plan, self.resolved, self.stats = pipe, plan, None, {}
        self.on_call: Callable[[int, int], None] | None = None
        self._fixed_plan, self._options, self._encoder = plan, options, encoder
        self._last: tuple | None = None  # (what the last call asked for, the plan made for it)
        self._max_rows, self._rules, self._branch_noise, self._probe = max_rows, rules, branch_noise, probe
        self.attach()

    def attach(self) -> None:
        """Turn this sharing on for its pipeline (again)."""
        self.pipe._sage_sharing = self
        self.pipe.__class__ = _sharing_class(type(self.pipe))

    def disable(self) -> None:
        """Give the pipeline back as it was."""
        if self.pipe.__dict__.get("_sage_sharing") is self:
            del self.pipe.__dict__["_sage_sharing"]
            self.pipe.__class__ = type(self.pipe).__mro__[1]

    def __enter__(self) -> Sharing:
        if self.pipe.__dict__.get("_sage_sharing") is not self:  # entered again
            disable(self.pipe)
            self.attach()
        return self

    def __exit__(self, *exc_info) -> None:
        self.disable()

    def call(self, base_call: Callable, args: tuple, kwargs: dict) -> Any:
        """One call of the pipeline under a plan."""
        given = inspect.signature(base_call).bind_partial(self.pipe, *args, **kwargs)
        given.apply_defaults()
        self.stats, self.resolved = {}, None
        self.plan = self._plan_call(given.arguments)
        generators = given.arguments.get("generator")
        options = self.on_call, self._branch_noise, generators, self._probe
        run = Run(self.plan, self.pipe, self._max_rows, self._rules, *options)
        start = time.perf_counter()
        with run.installed():
            result = base_call(self.pipe, *args, **kwargs)
            run.check_finished()
        self.resolved = run.resolved
        self.stats = {**run.stats(), "seconds": time.perf_counter() - start}
        return result

    def _plan_call(self, given: Mapping[str, Any]) -> SharingPlan:
        """The plan of one call: the fixed one, checked against the call, or a new one from the call's prompts."""
        asked = Request(self.pipe, given)
        if self._fixed_plan is not None:
            asked.check(self._fixed_plan)
            return self._fixed_plan
        if asked.prompts is None:
            raise ValueError("the call gives no prompt: there is no text to group by; pass plan= to sage.enable")
        fresh = self._encoder == "pipeline"  # its text encoder may have changed (LoRA)
        if fresh or self._last is None or self._last[0] != (asked.prompts, asked.images, asked.pictures):
            embeddings = embed_prompts(asked.prompts, encoder=self._encoder, pipe=self.pipe)
            self._last = (asked.prompts, asked.images, asked.pictures), asked.plan(embeddings, self._options)
        return self._last[1]


def check_grouping(share: float, similarity: float, max_group_size: int, max_rows: int | None = None) -> None:
    """Refuse options out of range, before any prompt is embedded.

    Raises:
        TypeError, ValueError: see `enable` for the types and ranges.
    """
    fraction(share, "share")
    threshold(similarity, "similarity")
    integer(max_group_size, "max_group_size", 1)
    if max_rows is not None:
        integer(max_rows, "max_rows", 1)


@functools.lru_cache(maxsize=None)
def _sharing_class(base: type) -> type:
    """The subclass of a pipeline class whose calls go through `Sharing.call`; it carries `base`'s names."""

    @functools.wraps(base.__call__)
    def __call__(self, *args, **kwargs):
        return self._sage_sharing.call(base.__call__, args, kwargs)

    def __reduce_ex__(self, protocol):
        state = {key: value for key, value in self.__dict__.items() if key != "_sage_sharing"}
        return _stock_copy, (base, state)

    namespace = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__call__": __call__,
        "__reduce_ex__": __reduce_ex__,  # a copy or a pickle of the pipeline is a stock pipeline
    }
    return type(base.__name__, (base,), namespace)


def _stock_copy(base: type, state: dict):
    pipe = object.__new__(base)
    pipe.__dict__.update(state)
    return pipe
