"""What a test needs to know of one pipeline family, and the shared loop that all hand-written ones have in common."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

PICTURES = [0, 1, 2, 3, 4]  # a picture's number decides what conditions it
SEEDS = [100 + number for number in PICTURES]
GROUPS = [[0, 2, 4], [1, 3]]


@dataclass(frozen=True)
class Family:
    """One row of the support matrix.

    Attributes:
        name: as in the matrix, for example "Stable Diffusion XL".
        pipeline: name of the diffusers class.
        build: () → the tiny pipeline, random weights, the same ones every time, progress bar off.
        conditions: (pipe, pictures) → keyword arguments of the pipeline's call, everything but generators and output_type.
            Row i depends on pictures[i] alone.
        start: (pipe, kwargs of one picture, generator) → initial latents of one row [1, ...], as the pipeline draws them.
        predict: (pipe, x, t, condition of one row, step number) → the model output after guidance, for one row [1, ...].
        row: (pipe, kwargs, i) → the condition of row i, in the form that `predict` takes: a dict of tensors [1, ...].
        mean: (list of such dicts) → the condition of a trunk: what the project's rules promise, written out by hand.
        steps: denoising steps of a call.
        calls: calls of `scheduler.step` in it (more than `steps` for two-stage solvers).
        finish: (pipe, x) → what the pipeline's call returns for output_type="latent" (unpacking and the like).
        step: (scheduler, model output, t, x, generator) → the next x; None: `scheduler.step(...).prev_sample`.
        scheduler_setup: (pipe, scheduler) → sets the timesteps as the pipeline does; None: `set_timesteps(steps)`.
        after_step: (pipe, kwargs, x, step number, scheduler, i, generator) → x as the pipeline goes on with it (inpainting);
            None: nothing.
    """

    name: str
    pipeline: str
    build: Callable[[], Any]
    conditions: Callable[[Any, list[int]], dict]
    start: Callable[..., torch.Tensor]
    predict: Callable[..., torch.Tensor]
    row: Callable[..., dict]
    mean: Callable[[list[dict]], dict]
    steps: int = 4
    calls: int = 4
    finish: Callable = lambda pipe, x: x
    step: Callable | None = None
    scheduler_setup: Callable | None = None
    after_step: Callable | None = None


def draw(family: Family, pipe, pictures=PICTURES, seeds=SEEDS, **kwargs) -> torch.Tensor:
    """The pipeline's own call, a generator per picture: latents [B, ...]."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    options = {**family.conditions(pipe, pictures), "output_type": "latent", **kwargs}
    return pipe(**options, generator=generators, return_dict=False)[0]


def mean_of(name: str, conditions: list[dict]) -> torch.Tensor:
    """[1, ...]: the plain mean of one entry."""
    return torch.stack([condition[name] for condition in conditions]).double().mean(0).to(conditions[0][name].dtype)


@torch.no_grad()
def shared_by_hand(family: Family, pipe, pictures=PICTURES, seeds=SEEDS, groups=GROUPS, branch=2) -> torch.Tensor:
    """Flat sharing with stock diffusers parts: a trunk of one row, then scheduler and latents copied for every member.

    Args:
        groups: lists of row numbers; the first member's noise is the trunk's.
        branch: calls that a group of more than one runs as one row.
    """
    kwargs = family.conditions(pipe, pictures)
    results: list = [None] * len(pictures)
    for group in groups:
        scheduler = copy.deepcopy(pipe.scheduler)
        if family.scheduler_setup is None:
            scheduler.set_timesteps(family.steps)
        else:
            family.scheduler_setup(pipe, scheduler)
        generators = {i: torch.Generator().manual_seed(seeds[i]) for i in group}
        starts = {i: family.start(pipe, family.conditions(pipe, [pictures[i]]), generators[i]) for i in group}
        rows = {i: family.row(pipe, kwargs, i) for i in group}
        calls = branch if len(group) > 1 else 0
        first, trunk = group[0], family.mean([rows[i] for i in group])
        x = starts[first]
        for s in range(calls):
            stepped = _step(family, pipe, scheduler, x, s, trunk, generators[first])
            x = _settle(family, pipe, scheduler, stepped, s, kwargs, first, generators[first])
        for i in group:
            own, y = copy.deepcopy(scheduler), starts[i]
            if calls:
                y = _settle(family, pipe, own, stepped, calls - 1, kwargs, i, generators[i])
            for s in range(calls, family.calls):
                y = _step(family, pipe, own, y, s, rows[i], generators[i])
                y = _settle(family, pipe, own, y, s, kwargs, i, generators[i])
            results[i] = y
    return torch.cat([family.finish(pipe, x) for x in results])


def _step(family, pipe, scheduler, x, s, condition, generator):
    """One call of the denoiser and of the solver, for one row."""
    t = scheduler.timesteps[s]
    output = family.predict(pipe, x, t, condition, s)
    if family.step is not None:
        return family.step(scheduler, output, t, x, generator)
    return scheduler.step(output, t, x, return_dict=False)[0]


def _settle(family, pipe, scheduler, x, s, kwargs, i, generator):
    """What the pipeline itself makes of a step's result: row i's own background."""
    return x if family.after_step is None else family.after_step(pipe, kwargs, x, s, scheduler, i, generator)
