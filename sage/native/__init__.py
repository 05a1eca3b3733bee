"""The native loop for the pipelines of diffusers that it knows: their parts, and `sage.sample` instead of their loop.

A family is one adapter, built on the pipeline's public methods. What an adapter does not cover raises `NotNative`, which names
the argument or the feature; the pipeline's own call inside `sage.enable` covers everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import torch

from sage.native.base import Adapter, NotNative
from sage.native.flux import Flux
from sage.native.loop import run
from sage.native.pixart import PixArt
from sage.native.sd import StableDiffusion, StableDiffusionXL
from sage.native.sd3 import StableDiffusion3
from sage.native.wan import Wan
from sage.plan import ResolvedPlan, SharingPlan
from sage.plan_checks import integer
from sage.probe import Probe
from sage.trunk import Trunk

__all__ = ["ADAPTERS", "NotNative", "adapter_for", "draw"]

# Pipeline class of diffusers → its adapter. A subclass may do anything else in its call: it has no adapter.
ADAPTERS: dict[str, type[Adapter]] = {
    "FluxPipeline": Flux,
    "PixArtAlphaPipeline": PixArt,
    "PixArtSigmaPipeline": PixArt,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "WanPipeline": Wan,
}


def adapter_for(pipe) -> type[Adapter] | None:
    """The adapter of a pipeline's class; None if the native loop does not know the class."""
    cls = type(pipe)
    if "_sage_sharing" in pipe.__dict__:  # sage.enable made a subclass
        cls = cls.__mro__[1]
    known = ADAPTERS.get(cls.__name__)
    return known if known is not None and getattr(diffusers, cls.__name__, None) is cls else None


@torch.no_grad()
def draw(
    pipe,
    plan: SharingPlan,
    prompts: Sequence[str],
    negatives: Sequence[str] | None,
    generators: Sequence[torch.Generator],
    *,
    on_call: Callable[[int, int], None] | None = None,
    max_rows: int | None = None,
    graphs: bool = False,
    trunk: Trunk | None = None,
    on_part: Callable[[int, Trunk], None] | None = None,
    branch_noise: float = 0.0,
    branch_back: int = 0,
    probe: Probe | None = None,
    **call_kwargs,
) -> tuple[Any, dict[str, Any], ResolvedPlan]:
    """Draw one picture per leaf of a plan, as the pipeline's own call inside `sage.enable(pipe, plan)` would.

    Args:
        pipe: a pipeline that `adapter_for` has an adapter for. It is left as its own call leaves it.
        plan: over B leaves.
        prompts: B texts.
        negatives: B texts; None: the pipeline's default.
        generators: B generators, one per leaf. They draw what the pipeline and its scheduler would, and end in the same state.
        on_call: called after each denoiser call with (rows evaluated, number of calls).
        max_rows: the most rows (guidance copies counted) that the denoiser is given at once; halved when memory runs out.
        graphs: replay CUDA graphs of the denoiser's calls, see `sage.sample`.
        trunk: every picture joins it, see `sage.sample`; the plan is followed in the calls that remain.
        on_part: is given the trunk of every group that parts, see `sage.sample`.
        branch_noise: strength of the noise that members get as they part, drawn as in `sage.enable`.
        branch_back: calls that members are taken back by as they part, see `sage.sample`; their noise is of generators that are
            seeded from clones of theirs. In the statistics `rows` has an entry per denoiser call made, in order.
        probe: parts groups early where their members' predictions are apart, see `sage.Probe`; the plan that is returned is the one
            that was followed.
        call_kwargs: arguments of the pipeline's call.

    Returns:
        The pictures as the pipeline's call returns them, the statistics (see `sage.Sharing.stats`; without `seconds`), and the
        plan that was followed.

    Raises:
        NotNative: the pipeline, an argument, its scheduler or a feature that is on is not covered. Raised before anything was
            drawn from the generators.
        ValueError: the trunk was made with another scheduler set-up, or is of other latents than the pipeline's; a probe beside
            what excludes it (see `sage.sample`). Raised before the first denoiser call.
    """
    adapter = adapter_for(pipe)
    if adapter is None:
        raise NotNative(
            f"{type(pipe).__name__} has no native adapter (there are {', '.join(ADAPTERS)}); call the pipeline inside sage.enable"
        )
    leaves = len(plan.leaves)
    for name, given in (("prompts", prompts), ("negatives", negatives), ("generators", generators)):
        if given is not None and len(given) != leaves:
            raise ValueError(f"{name} must hold {leaves} entries, one per leaf of the plan, got {len(given)}")
    return run(
        adapter(pipe, call_kwargs),
        plan,
        list(prompts),
        None if negatives is None else list(negatives),
        list(generators),
        on_call=on_call,
        max_rows=max_rows,
        graphs=graphs,
        trunk=trunk,
        on_part=on_part,
        branch_noise=branch_noise,
        branch_back=integer(branch_back, "branch_back", 0),
        probe=probe,
    )
