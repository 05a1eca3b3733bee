"""Pictures of the validation prompts, drawn as the model will be used: with sharing on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from sage.generation import generate
from sage.output import picture_name, png_bytes, write_atomic
from sage.training.options import TrainOptions


def draw_pictures(pipe, folder: Path, options: TrainOptions, num_inference_steps: int, resolution: int) -> list[Path]:
    """Draw each validation prompt, with the share of the training, and write the pictures as PNG; their chunks say prompt, seed and plan.

    Returns:
        The files, prompt after prompt.
    """
    result = generate(
        pipe,
        list(options.validation_prompt),
        share=options.share if options.shares else 0.0,
        similarity=options.similarity,
        max_group_size=options.max_group_size,
        encoder=options.encoder,
        images_per_prompt=options.num_validation_images,
        seed=options.seed,
        num_inference_steps=num_inference_steps,
        height=resolution,
        width=resolution,
        progress=False,
    )
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for image, record in zip(result.images, result.records, strict=True):
        files.append(folder / picture_name(record["index"], record["prompt"]))
        write_atomic(files[-1], png_bytes(image, record, {"steps": num_inference_steps, "share": options.share}))
    return files


@contextlib.contextmanager
def evaluating(denoiser: torch.nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """The denoiser as a pipeline calls it while inside: in evaluation mode, and without what mixed precision has put around it.

    accelerate's own wrapper answers in float32, whatever it was given, which is no pipeline's way.
    """
    wrapper = denoiser.__dict__.pop("forward", None)
    denoiser.eval()
    try:
        with accelerator.autocast():
            yield
    finally:
        denoiser.train()
        if wrapper is not None:
            denoiser.forward = wrapper


@contextlib.contextmanager
def averaged(ema: EMAModel | None, parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """The averaged weights in the place of the trained ones while inside; None: nothing changes."""
    parameters = list(parameters)
    if ema is not None:
        ema.store(parameters)
        ema.copy_to(parameters)
    try:
        yield
    finally:
        if ema is not None:
            ema.restore(parameters)
