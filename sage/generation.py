"""Prompts in, pictures out: embed, plan, pack groups into pipeline calls, run them with sharing on."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from sage.embed import embed_prompts
from sage.grouping import plan_prompts
from sage.plan import ResolvedPlan, SharingPlan
from sage.plan_checks import integer, texts
from sage.scheduler import SageScheduler
from sage.sharing import check_options, disable, enable, mismatch
from sage.solvers import solver_name


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
        stats: `nfe`, `nfe_independent`, `saving`, `guidance_copies`, `rows` (per denoiser call, over all packs), `boundaries`
            (per call, whether a group might part after it; None: after any), `packs`,
            `denoise_seconds`, `seconds`, `images_per_second`, `solver`, `solver_path`, `encoder`.
    """

    images: list
    records: list[dict[str, Any]]
    plan: SharingPlan
    stats: dict[str, Any]


def generate(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    plan: SharingPlan | None = None,
    share: float = 0.4,
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
    batch_size: int = 32,
    max_rows: int | None = None,
    progress: bool = True,
    on_images: Callable[[list[int], list, list[dict[str, Any]]], None] | None = None,
    **pipe_kwargs,
) -> GenerationResult:
    """Make pictures of many prompts, running the early denoising steps of similar prompts once.

    Args:
        pipe: a diffusers text-to-image pipeline. It is left as it was, whatever happens.
        prompts: n of them. A prompt that occurs more than once gets a picture for each occurrence.
        plan: follow this plan (over n · `images_per_prompt` leaves with these prompts) instead of making one.
        share: β in [0, 1], the fraction of the denoiser calls that a group runs as one row; 0 shares nothing.
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
        batch_size: pictures per pipeline call; whole groups are packed into calls of at most this many (a larger group gets
            a call of its own).
        max_rows: the most denoiser rows at once (guidance copies counted), see `sage.enable`.
        progress: show a progress bar over denoiser rows.
        on_images: called after each pack with (indices, images, records), indices in the order asked for.
        pipe_kwargs: anything else the pipeline's call takes.

    Returns:
        GenerationResult.

    Raises:
        ValueError, TypeError: an argument is out of range or does not fit the others. Raised before any denoiser call.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(f"pipe must be a diffusers pipeline, got {type(pipe).__name__}")
    start = time.perf_counter()
    prompts = texts(prompts, "prompts")
    _check_pipe_kwargs(pipe, pipe_kwargs)
    negatives = _check_prompts(prompts, images_per_prompt, seeds, negative_prompt, batch_size)
    embeddings = None
    if plan is None:
        check_options(share, similarity, max_group_size, max_rows)
        grouping = dict(share=share, similarity=similarity, max_group_size=max_group_size, images_per_prompt=images_per_prompt)
        embeddings = embed_prompts(prompts, encoder=encoder, pipe=pipe)
        plan = plan_prompts(prompts, embeddings, **grouping)
    asked = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    if [leaf.prompt for leaf in plan.leaves] != asked:
        raise ValueError(mismatch(asked, [leaf.prompt for leaf in plan.leaves]))
    plan = seeded(plan, seed, seeds, images_per_prompt)
    similarities = None if embeddings is None else trunk_similarities(plan, embeddings.vectors, images_per_prompt)
    if negatives is not None:
        negatives = [negative for negative in negatives for _ in range(images_per_prompt)]
    chosen = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    call_kwargs = {**pipe_kwargs, **{name: value for name, value in chosen.items() if value is not None}}
    images: list = [None] * len(plan.leaves)
    records: list = [None] * len(plan.leaves)
    stats: list[dict] = []
    with _borrowed(pipe, solver), _Progress(plan, progress) as bar:
        for roots in pack(plan, batch_size):
            part, indices = plan.subset(roots)
            part_negatives = None if negatives is None else [negatives[i] for i in indices]
            made, sharing = _run_pack(pipe, part, part_negatives, max_rows, bar.on_call, call_kwargs)
            stats.append(sharing.stats)
            made_records = _records(plan, indices, similarities, negatives, sharing.resolved)
            for index, image, record in zip(indices, made, made_records):
                images[index], records[index] = image, record
            if on_images is not None:
                on_images([int(i) for i in indices], list(made), made_records)
        solver = solver or solver_name(pipe.scheduler)
    summary = _summary(stats, time.perf_counter() - start, len(images), solver, plan.encoder)
    return GenerationResult(images, records, plan, summary)


def leaf_seed(base: int, prompt: str, image_index: int) -> int:
    """A picture's seed from (base seed, prompt text, image index): 63 bits of BLAKE2b, the same on every machine."""
    text = f"{base}\x00{image_index}\x00{prompt}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def seeded(plan: SharingPlan, base: int = 0, seeds: Sequence[int] | None = None, images: int = 1) -> SharingPlan:
    """The plan with a seed on every leaf: the caller's, else the one that the plan brings, else `leaf_seed`.

    Args:
        base: base seed of the derived ones.
        seeds: one per prompt; image k of a prompt gets its seed + k.
        images: pictures of each prompt; leaf i belongs to prompt i // images.
    """
    leaves = []
    for index, leaf in enumerate(plan.leaves):
        seed = leaf.seed
        if seeds is not None:
            seed = seeds[index // images] + index % images
        elif seed is None:
            seed = leaf_seed(base, leaf.prompt, leaf.image_index)
        leaves.append(replace(leaf, seed=seed))
    return replace(plan, leaves=tuple(leaves))


def trunk_similarities(plan: SharingPlan, vectors: np.ndarray, images: int = 1) -> np.ndarray:
    """float [B]: cosine of each leaf's prompt with that of its trunk's representative.

    Args:
        vectors: [n, d], rows of length 1, one per prompt; leaf i belongs to prompt i // images.
    """
    trunks = np.array([plan.roots[root].representative for root in plan.root_of])
    prompt_of = np.arange(len(plan.leaves)) // images
    return (vectors[prompt_of] * vectors[prompt_of[trunks]]).sum(axis=1)


def pack(plan: SharingPlan, batch_size: int) -> list[list[int]]:
    """Pack a plan's roots into calls of at most `batch_size` leaves: in order, whole groups, first call that has room.

    Returns:
        Lists of root indices; a root with more leaves than `batch_size` is a call of its own.
    """
    packs: list[list[int]] = []
    room: list[int] = []
    for number, root in enumerate(plan.roots):
        size = len(root.members)
        place = next((i for i, free in enumerate(room) if free >= size), None)
        if place is None:
            packs.append([])
            room.append(batch_size)
            place = len(packs) - 1
        packs[place].append(number)
        room[place] -= size
    return packs


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


def _run_pack(pipe, plan: SharingPlan, negatives, max_rows, on_call, kwargs: dict):
    """One pipeline call over the leaves of `plan`, each with a generator of its own."""
    generators = [torch.Generator().manual_seed(leaf.seed) for leaf in plan.leaves]
    if negatives is not None:
        kwargs = {**kwargs, "negative_prompt": negatives}
    with enable(pipe, plan, max_rows=max_rows) as sharing:
        sharing.on_call = on_call
        out = pipe([leaf.prompt for leaf in plan.leaves], generator=generators, **kwargs)
    return out[0] if isinstance(out, tuple) else out.images, sharing


class _Progress:
    """A bar over denoiser rows: its length is known as soon as the first call knows the number of denoiser calls."""

    def __init__(self, plan: SharingPlan, enabled: bool):
        self.plan = plan
        self.bar = tqdm(unit="row", disable=not enabled, desc="denoising")

    def on_call(self, rows: int, num_calls: int) -> None:
        if self.bar.total is None:
            self.bar.total = self.plan.cost(num_calls).nfe
        self.bar.update(rows)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exc_info) -> None:
        self.bar.close()


# What would have to be split over the packs, or is decided by the plan.
_NOT_FOR_GENERATE = {
    "generator": "use seed or seeds",
    "latents": "each picture's come from its seed",
    "prompt": "prompts are the second argument",
    "prompt_embeds": "pass prompts",
    "negative_prompt_embeds": "pass negative_prompt",
    "num_images_per_prompt": "use images_per_prompt",
    "image": "only text-to-image pipelines are packed; call the pipeline inside sage.enable",
    "return_dict": "the result is a GenerationResult",
    "callback_on_step_end": "call the pipeline inside sage.enable",
}


def _check_pipe_kwargs(pipe, pipe_kwargs: dict) -> None:
    for name in pipe_kwargs:
        if name in _NOT_FOR_GENERATE:
            raise ValueError(f"{name} cannot be passed to sage.generate: {_NOT_FOR_GENERATE[name]}")
    known = inspect.signature(type(pipe).__call__).parameters
    unknown = [name for name in pipe_kwargs if name not in known]
    if unknown:
        raise TypeError(f"{unknown[0]} is an argument neither of sage.generate nor of {type(pipe).__name__}'s call")


def _check_prompts(prompts, images_per_prompt, seeds, negative_prompt, batch_size) -> list[str] | None:
    """Refuse bad arguments; returns one negative prompt per prompt, or None."""
    integer(images_per_prompt, "images_per_prompt", 1)
    integer(batch_size, "batch_size", 1)
    if seeds is not None and len(seeds) != len(prompts):
        raise ValueError(f"seeds must hold one seed per prompt, {len(prompts)}, got {len(seeds)}")
    if negative_prompt is None or isinstance(negative_prompt, str):
        return None if negative_prompt is None else [negative_prompt] * len(prompts)
    if len(negative_prompt) != len(prompts):
        raise ValueError(f"negative_prompt must be one for all or one per prompt, {len(prompts)}, got {len(negative_prompt)}")
    return texts(negative_prompt, "negative_prompt")


def _records(plan: SharingPlan, indices, similarities, negatives, resolved: ResolvedPlan) -> list[dict[str, Any]]:
    """One record per picture of a pack; see `GenerationResult.records`.

    Args:
        indices: [B'] the pack's leaves in `plan`, in the order of `resolved`'s leaves.
        resolved: what the pipeline's call followed.
    """
    root_of = plan.root_of
    records = []
    for row, index in enumerate(map(int, indices)):
        leaf, root = plan.leaves[index], plan.roots[root_of[index]]
        branch_call = resolved.branch_call(row)
        trunk = plan.leaves[root.representative] if branch_call > 0 else leaf  # nothing was shared: its own
        similar = None if similarities is None else float(similarities[index]) if branch_call > 0 else 1.0
        records.append(
            {
                "index": index,
                "prompt": leaf.prompt,
                "negative_prompt": None if negatives is None else negatives[index],
                "image_index": leaf.image_index,
                "seed": leaf.seed,
                "group": int(root_of[index]),
                "group_size": len(root.members),
                "trunk_seed": trunk.seed,
                "trunk_prompt": trunk.prompt,
                "branch_call": branch_call,
                "num_calls": resolved.num_calls,
                "similarity_to_trunk": similar,
            }
        )
    return records


def _summary(packs: list[dict], seconds: float, pictures: int, solver: str, encoder: str) -> dict[str, Any]:
    """See `GenerationResult.stats`."""
    nfe, independent = sum(p["nfe"] for p in packs), sum(p["nfe_independent"] for p in packs)
    calls = max(len(p["rows"]) for p in packs)
    return {
        "nfe": nfe,
        "nfe_independent": independent,
        "saving": 1 - nfe / independent if independent else 0.0,
        "guidance_copies": packs[0]["guidance_copies"],
        "rows": [sum(p["rows"][s] for p in packs if s < len(p["rows"])) for s in range(calls)],
        "boundaries": packs[0]["boundaries"],
        "packs": len(packs),
        "denoise_seconds": sum(p["denoise_seconds"] for p in packs),
        "seconds": seconds,
        "images_per_second": pictures / seconds,
        "solver": solver,
        "solver_path": packs[0]["solver_path"],
        "encoder": encoder,
    }
