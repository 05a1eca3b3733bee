"""Prompts in, pictures out: embed, plan, pack groups into pipeline calls, run them with sharing on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from sage import native
from sage.adapters import usual_share
from sage.caches import cache_hooks
from sage.embed import embed_prompts
from sage.generation_checks import check_options, check_pipe_kwargs, check_seeds, is_text, texts_of_pictures
from sage.packing import packs
from sage.plan import Leaf, SharingPlan
from sage.plan_checks import fraction, integer, texts
from sage.plans import plan_prompts
from sage.probe import Probe
from sage.records import picture_records, probe_records, summary
from sage.request import mismatch
from sage.sampling_checks import check_probe
from sage.scheduler import SageScheduler
from sage.seeds import seeded
from sage.sharing import check_grouping, disable, enable
from sage.solvers import solver_name
from sage.trunk import Trunk

ENGINES = ("auto", "native", "hook")


@dataclass
class GenerationResult:
    """What `generate` returns.

    Attributes:
        images: the pictures (as the pipeline gives them: PIL by default), in the order asked for: prompts in order, the
            images of a prompt consecutive.
        records: one dict per picture: `index`, `prompt`, `negative_prompt`, `image_index`, `seed`, `group`, `group_size`,
            `trunk_seed`, `trunk_prompt` (the representative whose noise the shared steps used), `branch_call` (the denoiser
            call from which it ran alone), `num_calls`, `similarity_to_trunk` (cosine; None for a plan that was passed in).
        plan: the `SharingPlan` that was followed.
        stats: `nfe`, `nfe_independent`, `saving`, `guidance_copies`, `rows` (of the denoiser calls made, in order, over all packs;
            those made again by `branch_back` are among them), `boundaries` (per call, whether a group might part after it; None:
            after any), `packs`, `launches`, `max_rows` (at the end), `denoise_seconds`, `seconds`, `images_per_second`, `solver`,
            `solver_path`, `encoder`, `engine` ("native" or "hook"), `engine_reason` (why not native), `probes` (None without a probe;
            else a dict per probe made, pack after pack, see `sage.probe.Course.records`; its rows are among the others), `cache` (None
            without a cache in the denoiser; else its name and what it computed, see `sage.caches.Caches.stats`).
        trunks: with `keep_trunks`, index into `plan.roots` → the group's `sage.Trunk`, on the CPU; groups that shared nothing
            or never parted have none.
    """

    images: list
    records: list[dict[str, Any]]
    plan: SharingPlan
    stats: dict[str, Any]
    trunks: dict[int, Trunk] = field(default_factory=dict)


def generate(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    plan: SharingPlan | None = None,
    share: float | None = None,
    similarity: float = 0.6,
    max_group_size: int = 8,
    images_per_prompt: int = 1,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    solver: str | None = None,
    encoder: str = "auto",
    max_rows: int | None = 64,
    engine: str = "auto",
    keep_trunks: bool = False,
    trunk: Trunk | None = None,
    branch_noise: float = 0.0,
    branch_back: int = 0,
    probe: Probe | None = None,
    progress: bool = True,
    on_images: Callable[[list[int], list, list[dict[str, Any]]], None] | None = None,
    **pipe_kwargs,
) -> GenerationResult:
    """Make pictures of many prompts, running the early denoising steps of similar prompts once.

    Args:
        pipe: a diffusers text-to-image pipeline. It is left as it was, whatever happens.
        prompts: n of them. A prompt that occurs more than once gets a picture for each occurrence.
        plan: follow this plan (over n · `images_per_prompt` leaves with these prompts) instead of making one.
        share: β in [0, 1], the fraction of the denoiser calls that a group runs as one row; 0 shares nothing. None: what the adapter
            of `sage.load_adapter` was trained for, 0.4 without one.
        similarity: τ in (−1, 1], the least cosine between any two prompts of a group.
        max_group_size: the most prompts in a group.
        images_per_prompt: pictures of each prompt.
        seed: base seed. Each picture's seed is derived from (seed, prompt, image index): it does not depend on the other
            prompts or their order.
        seeds: one per prompt, instead of derived ones; image k of a prompt uses its seed + k.
        negative_prompt: one for all, or one per prompt.
        num_inference_steps, guidance_scale: None: the pipeline's own defaults.
        solver: a name from `sage.solvers.SOLVERS`; None keeps the pipeline's scheduler.
        encoder: what embeds the prompts for grouping, see `sage.enable`.
        max_rows: the most denoiser rows at once (guidance copies counted); memory follows it, not the number of prompts. As
            many groups go into one pipeline call as fill it while they are one row each; once they have parted they go through
            the denoiser in pieces (with a cache on, in calls of fewer pictures). Halved, with a warning, when memory runs out.
            None: everything at once.
        engine: "native": `sage.sample` in place of the pipeline's loop, for the pipelines and options of `sage.native`; "hook": the
            pipeline's own loop inside `sage.enable`, for all others; "auto": native where it goes. Both give the same pictures;
            which one ran, and why, is in the stats.
        keep_trunks: keep the state of every group where it parts, in the result's `trunks`. Native loop only.
        trunk: every picture joins this trunk instead of beginning with noise of its own: the calls before are not run, and
            `plan` (default: each picture alone) is followed in those that remain. Native loop only; the pipeline, solver,
            number of steps and size must be those that it was made with.
        branch_noise: strength, in [0, 1], of the noise of their own that members get as their group parts, see `sage.enable`.
        branch_back: denoiser calls that members are taken back by as their group parts, to be noised and make them again on
            their own, see `sage.sample`; they are counted in the stats. Native loop only.
        probe: at some calls every group that is to part later is compared with what it parts into, and parts at once where their
            predictions are apart, see `sage.Probe`. The records and stats say what happened.
        progress: show a progress bar over denoiser rows; without its end where a probe decides how many there are.
        on_images: called after each pack with (indices, images, records), indices in the order asked for.
        pipe_kwargs: anything else the pipeline's call takes; `prompt_2` and the like are one for all, or one per prompt.

    Returns:
        GenerationResult.

    Raises:
        ValueError, TypeError: an argument is out of range or does not fit the others. Raised before any denoiser call.
        sage.native.NotNative: `engine` is "native", or trunks or `branch_back` are asked for, and the native loop does not cover
            the call.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(f"pipe must be a diffusers pipeline, got {type(pipe).__name__}")
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(map(repr, ENGINES))}, got {engine!r}")
    branch_back = integer(branch_back, "branch_back", 0)
    if engine == "hook" and (keep_trunks or trunk is not None or branch_back > 0):
        name = "keep_trunks" if keep_trunks else "trunk" if trunk is not None else "branch_back"
        raise ValueError(f'{name} needs the native loop, got engine="hook"; use engine="auto" or "native"')
    if fraction(branch_noise, "branch_noise") > 0 and keep_trunks:
        raise ValueError(
            f"branch_noise {branch_noise} and keep_trunks exclude each other: what a later picture could join is the state before "
            "its members' noise; keep trunks in a run without branch_noise"
        )
    if branch_back > 0 and (keep_trunks or branch_noise > 0):
        other = "keep_trunks" if keep_trunks else "branch_noise"
        raise ValueError(f"branch_back {branch_back} and {other} exclude each other, see sage.sample; use one without the other")
    check_probe(probe, branch_noise, branch_back, keep_trunks or None)
    if trunk is not None and not isinstance(trunk, Trunk):
        raise TypeError(f"trunk must be a sage.Trunk, got {type(trunk).__name__}; sage.Trunk.load(path) reads one from a file")
    start = time.perf_counter()
    prompts = texts(prompts, "prompts")
    integer(images_per_prompt, "images_per_prompt", 1)
    check_options(plan, seed, guidance_scale, num_inference_steps, on_images)
    share = usual_share(pipe, share)
    check_grouping(share, similarity, max_group_size, max_rows)
    check_pipe_kwargs(pipe, pipe_kwargs)
    check_seeds(seeds, len(prompts))
    given = {"negative_prompt": negative_prompt, **{name: value for name, value in pipe_kwargs.items() if is_text(name)}}
    picture_texts = texts_of_pictures(given, prompts, images_per_prompt)
    embeddings = None
    if plan is None and trunk is not None:
        plan = SharingPlan.independent([Leaf(prompt, k) for prompt in prompts for k in range(images_per_prompt)])
    if plan is None:
        grouping = dict(share=share, similarity=similarity, max_group_size=max_group_size, images_per_prompt=images_per_prompt)
        embeddings = embed_prompts(prompts, encoder=encoder, pipe=pipe)
        plan = plan_prompts(prompts, embeddings, **grouping)
    asked = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    if [leaf.prompt for leaf in plan.leaves] != asked:
        raise ValueError(mismatch(asked, [leaf.prompt for leaf in plan.leaves]))
    plan = seeded(plan, seed, seeds, images_per_prompt)
    similarities = None if embeddings is None else trunk_similarities(plan, embeddings.vectors, images_per_prompt)
    chosen = {**pipe_kwargs, "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    call_kwargs = {name: value for name, value in chosen.items() if not is_text(name) and value is not None}
    images: list = [None] * len(plan.leaves)
    records: list = [None] * len(plan.leaves)
    stats: list[dict] = []
    trunks: dict[int, Trunk] = {}
    loop = _Loop(pipe, engine, call_kwargs, trunk, keep_trunks, branch_noise, branch_back, probe)
    copies, num_calls = 1 if guidance_scale is not None and guidance_scale <= 1 else 2, num_inference_steps or 20
    nodes = None if max_rows is None else max(1, max_rows // copies)
    left = packs(plan, nodes, num_calls, pieces=not loop.whole)
    with _borrowed(pipe, solver), _Progress(None if probe else plan, branch_back, progress) as bar:
        while left:
            roots = left.pop(0)
            part, indices = plan.subset(roots)
            part_texts = {name: [of_pictures[i] for i in indices] for name, of_pictures in picture_texts.items()}
            made, pack_stats, resolved, kept = loop(part, part_texts, max_rows, bar.on_call)
            stats.append(pack_stats | {"probes": probe_records(pack_stats["probes"], indices)})
            trunks |= {sorted(roots)[root]: kept_trunk for root, kept_trunk in kept.items()}
            max_rows = max_rows if loop.whole else pack_stats["max_rows"]
            former, nodes = nodes, None if max_rows is None else max(1, max_rows // pack_stats["copies_per_launch"])
            if nodes != former:  # other guidance copies than expected, or memory ran out
                left = packs(plan, nodes, num_calls, roots=[root for pack in left for root in pack], pieces=not loop.whole)
            made_records = picture_records(plan, indices, similarities, picture_texts.get("negative_prompt"), resolved, trunk)
            for index, image, record in zip(indices, made, made_records):
                images[index], records[index] = image, record
            if on_images is not None:
                on_images([int(i) for i in indices], list(made), made_records)
        solver = solver or solver_name(pipe.scheduler)
    totals = summary(stats, time.perf_counter() - start, len(images), solver, plan.encoder)
    totals |= {"engine": loop.engine, "engine_reason": loop.reason}
    return GenerationResult(images, records, plan, totals, trunks)


def trunk_similarities(plan: SharingPlan, vectors: np.ndarray, images: int = 1) -> np.ndarray:
    """float [B]: cosine of each leaf's prompt with that of its trunk's representative.

    Args:
        vectors: [n, d], rows of length 1, one per prompt; leaf i belongs to prompt i // images.
    """
    trunks = np.empty(len(plan.leaves), dtype=np.int64)
    for node in plan.trunks():
        trunks[list(node.members)] = node.representative
    prompt_of = np.arange(len(plan.leaves)) // images
    return (vectors[prompt_of] * vectors[prompt_of[trunks]]).sum(axis=1)


@contextlib.contextmanager
def _borrowed(pipe, solver: str | None):
    """The pipeline with another solver, its own progress bar silenced and VAE slicing on; everything put back at the end."""
    former, stock = pipe.__dict__.get("_sage_sharing"), pipe.scheduler
    scheduler = stock if solver is None else SageScheduler.from_config(stock.config, solver=solver)
    bar, vae = pipe.__dict__.get("_progress_bar_config"), getattr(pipe, "vae", None)
    sliced = getattr(vae, "use_slicing", None)
    try:
        pipe.scheduler = scheduler
        pipe.set_progress_bar_config(**{**(bar or {}), "disable": True})
        if sliced is False:
            vae.enable_slicing()
        yield
    finally:
        disable(pipe)
        if former is not None:
            former.attach()
        pipe.scheduler = stock
        pipe.__dict__.pop("_progress_bar_config", None)
        if bar is not None:
            pipe._progress_bar_config = bar
        if sliced is False:
            vae.disable_slicing()


class _Loop:
    """Runs the leaves of one plan through the pipeline, each with a generator of its own, by the engine asked for.

    Attributes:
        whole: a denoiser has a cache, which needs all rows of a call in one piece.
        engine: "native" or "hook", what runs.
        reason: why "auto" chose the hook; "" if it did not.
    """

    def __init__(
        self,
        pipe,
        engine: str,
        kwargs: dict,
        trunk: Trunk | None,
        keep_trunks: bool,
        branch_noise: float,
        branch_back: int,
        probe: Probe | None,
    ):
        self.pipe, self.kwargs, self.whole = pipe, kwargs, bool(cache_hooks(pipe))
        self.engine, self.reason = "hook" if engine == "hook" else "native", ""
        self._trunk, self._keep_trunks = trunk, keep_trunks
        self._branch_noise, self._branch_back, self._probe = branch_noise, branch_back, probe
        self._falls_back = engine == "auto" and trunk is None and not keep_trunks and branch_back == 0

    def __call__(self, plan: SharingPlan, texts: dict[str, list[str]], max_rows: int | None, on_call: Callable):
        """Run the plan's leaves; `texts` has what each is told beside its prompt.

        Returns:
            (images, stats, resolved plan, trunks by root).
        """
        prompts = [leaf.prompt for leaf in plan.leaves]
        kept: dict[int, Trunk] = {}

        def keep(root: int, trunk: Trunk) -> None:
            kept[root] = replace(trunk.to("cpu"), record=trunk.record | {"pipeline": type(self.pipe).__name__})

        options = dict(on_call=on_call, max_rows=max_rows, branch_noise=self._branch_noise, probe=self._probe)
        options |= dict(trunk=self._trunk, on_part=keep if self._keep_trunks else None, branch_back=self._branch_back)
        if self.engine == "native":
            others = {name: value for name, value in texts.items() if name != "negative_prompt"}
            negatives = texts.get("negative_prompt")
            try:
                return *native.draw(self.pipe, plan, prompts, negatives, _generators(plan), **options, **self.kwargs, **others), kept
            except native.NotNative as error:  # raised before anything was drawn
                if not self._falls_back:
                    raise
                self.engine, self.reason = "hook", str(error)
        shared = dict(max_rows=None if self.whole else max_rows, branch_noise=self._branch_noise, probe=self._probe)
        with enable(self.pipe, plan, **shared) as sharing:
            sharing.on_call = on_call
            out = self.pipe(prompt=prompts, generator=_generators(plan), **texts, **self.kwargs)
        return out[0] if isinstance(out, tuple) else out[next(iter(out))], sharing.stats, sharing.resolved, kept


def _generators(plan: SharingPlan) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(leaf.seed) for leaf in plan.leaves]


class _Progress:
    """A bar over denoiser rows: its length is known as soon as the first call knows the number of denoiser calls, if the plan is kept
    to; for None it has no end."""

    def __init__(self, plan: SharingPlan | None, branch_back: int, enabled: bool):
        self.plan, self.branch_back = plan, branch_back
        self.bar = tqdm(unit="row", disable=not enabled, desc="denoising")

    def on_call(self, rows: int, num_calls: int) -> None:
        if self.bar.total is None and self.plan is not None:
            self.bar.total = self.plan.cost(num_calls, branch_back=self.branch_back).nfe
        self.bar.update(rows)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exc_info) -> None:
        self.bar.close()
