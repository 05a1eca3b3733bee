"""What training must know about each pipeline family: its denoiser, its noise schedule, and what goes into a call.

`family_for(pipe)` gives the `Family` of a pipeline. A family speaks of images, captions and latents; how the pipeline scales,
packs and passes them on stays inside it.
"""

from __future__ import annotations

from typing import Any

from sage.training.families.base import Family
from sage.training.families.flux import Flux
from sage.training.families.pixart import PixArt
from sage.training.families.sana import Sana
from sage.training.families.schedule import NoiseSchedule
from sage.training.families.sd import StableDiffusion, StableDiffusionXL
from sage.training.families.sd3 import StableDiffusion3

__all__ = ["FAMILIES", "Family", "NoiseSchedule", "family_for"]

# Pipeline class of diffusers → its family. Subclasses count as the class.
FAMILIES: dict[str, type[Family]] = {
    "FluxPipeline": Flux,
    "PixArtAlphaPipeline": PixArt,
    "PixArtSigmaPipeline": PixArt,
    "SanaPipeline": Sana,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
}


def family_for(pipe, **call_arguments: Any) -> Family:
    """The family of a pipeline.

    Args:
        pipe: a text-to-image pipeline of diffusers.
        call_arguments: arguments of the pipeline's call that sampling will be done with and that reach the denoiser, for example
            `max_sequence_length`; each family names its own in `Family.call_arguments`. The default of each is the call's.

    Raises:
        NotImplementedError: no family covers the pipeline's class, its scheduler or its denoiser.
        TypeError: an argument is not one of `call_arguments`.
    """
    known = (FAMILIES[cls.__name__] for cls in type(pipe).__mro__ if cls.__name__ in FAMILIES)
    family = next(known, None)
    if family is None:
        raise NotImplementedError(f"{type(pipe).__name__} cannot be trained: pipelines that can are {', '.join(FAMILIES)}")
    return family(pipe, **call_arguments)
