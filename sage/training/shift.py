"""How large pictures are, and what a call for that size gives the scheduler, so that training sees the timesteps that sampling will."""

from __future__ import annotations

from typing import Any

import numpy as np
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from sage.prompts import InputError
from sage.training.families import Family
from sage.training.families.flux import Flux


def set_timesteps_arguments(family: Family, resolution: int, num_inference_steps: int) -> dict[str, Any]:
    """Arguments of `set_timesteps` beside the number of steps: `mu` where the schedule is shifted by the picture's size, Flux's `sigmas`.

    Args:
        resolution: side of the pictures [pixels].
    """
    scheduler, pipe, is_flux = family.pipe.scheduler, family.pipe, isinstance(family, Flux)
    config, arguments = scheduler.config, {}
    if is_flux and not config.get("use_flow_sigmas", False):
        arguments["sigmas"] = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
    if config.get("use_dynamic_shifting", False):
        patch = pipe.vae_scale_factor * (2 if is_flux else pipe.transformer.config.patch_size)
        arguments["mu"] = calculate_shift(
            (resolution // patch) ** 2,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15 if is_flux else 1.16),
        )
    return arguments


def picture_side(family: Family, asked: int | None, embedded: bool) -> int:
    """Side of the pictures [pixels]. Raises InputError where the model cannot have it."""
    pipe = family.pipe
    resolution = asked or (pipe.unet.config.sample_size * pipe.vae_scale_factor if embedded else 512)
    unit = pipe.image_processor.config.vae_scale_factor
    if resolution % unit:
        raise InputError(f"--resolution must be a multiple of {unit} for a {type(pipe).__name__}, got {resolution}.")
    return resolution
