"""What `sage.generate` refuses before anything is drawn, and the texts that a picture has beside its prompt."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Sequence
from typing import Any

from sage.plan import SharingPlan
from sage.plan_checks import integer, texts

# What would have to be split over the packs, or is decided by the plan.
_NOT_FOR_GENERATE = {
    "generator": "use seed or seeds",
    "latents": "each picture's come from its seed",
    "prompt": "prompts are the second argument",
    "prompt_embeds": "pass prompts",
    "negative_prompt_embeds": "pass negative_prompt",
    "num_images_per_prompt": "use images_per_prompt",
    "num_videos_per_prompt": "use images_per_prompt",
    "image": "only text-to-image pipelines are packed; call the pipeline inside sage.enable",
    "return_dict": "the result is a GenerationResult",
    "callback_on_step_end": "call the pipeline inside sage.enable",
}
_TEXT = re.compile(r"(negative_)?prompt(_\d)?")  # prompt_2, negative_prompt_3: what other text encoders are told


def check_options(plan, seed, guidance_scale, num_inference_steps, on_images) -> None:
    """Refuse options of the wrong type or out of range.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if plan is not None and not isinstance(plan, SharingPlan):
        raise TypeError(f"plan must be a sage.SharingPlan or None, got {type(plan).__name__}")
    integer(seed, "seed")
    if num_inference_steps is not None:
        integer(num_inference_steps, "num_inference_steps", 1)
    if guidance_scale is not None and (isinstance(guidance_scale, (bool, str)) or not math.isfinite(guidance_scale)):
        raise ValueError(f"guidance_scale must be a finite number, got {guidance_scale!r}")
    if on_images is not None and not callable(on_images):
        raise TypeError(f"on_images must be callable, got {type(on_images).__name__}")


def check_pipe_kwargs(pipe, pipe_kwargs: dict[str, Any]) -> None:
    """Refuse what the pipeline's call does not take, or what cannot be the same for all packs."""
    known = inspect.signature(type(pipe).__call__).parameters
    if "prompt" not in known:
        raise TypeError(f"pipe must take prompts, but the call of {type(pipe).__name__} has no argument prompt")
    for name in pipe_kwargs:
        if name in _NOT_FOR_GENERATE:
            raise ValueError(f"{name} cannot be passed to sage.generate: {_NOT_FOR_GENERATE[name]}")
        if name not in known:
            raise TypeError(f"{name} is an argument neither of sage.generate nor one that the call of {type(pipe).__name__} names")


def texts_of_pictures(given: dict[str, Any], prompts: Sequence[str], images: int) -> dict[str, list[str]]:
    """Argument name → one text per picture, from one for all or one per prompt.

    Args:
        given: texts beside the prompts; None is left out.
        images: pictures of each prompt.
    """
    found = {}
    for name, value in given.items():
        if value is None:
            continue
        of_prompts = [value] * len(prompts) if isinstance(value, str) else texts(value, name)
        if len(of_prompts) != len(prompts):
            raise ValueError(f"{name} must be one for all or one per prompt, {len(prompts)}, got {len(of_prompts)}")
        found[name] = [text for text in of_prompts for _ in range(images)]
    return found


def is_text(name: str) -> bool:
    """Whether an argument of a pipeline's call is a text, one per prompt."""
    return _TEXT.fullmatch(name) is not None


def check_seeds(seeds: Any, count: int) -> None:
    """Refuse anything but one integer per prompt, or None."""
    if seeds is None:
        return
    if isinstance(seeds, str) or not hasattr(seeds, "__len__"):
        raise TypeError(f"seeds must be a sequence of integers, one per prompt, got {type(seeds).__name__}")
    if len(seeds) != count:
        raise ValueError(f"seeds must hold one seed per prompt, {count}, got {len(seeds)}")
