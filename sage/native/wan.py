"""Wan 2.1 and 2.2, text to video; 2.2 has a second transformer for the low noise levels, with a guidance scale of its own."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.utils import logging

from sage.native.base import Adapter

logger = logging.get_logger(__name__)


class Wan(Adapter):
    """`WanPipeline`."""

    arguments = (
        "height",
        "width",
        "num_frames",
        "num_inference_steps",
        "guidance_scale",
        "guidance_scale_2",
        "max_sequence_length",
        "output_type",
    )
    guides_apart = True

    def __init__(self, pipe, call_kwargs):
        super().__init__(pipe, call_kwargs)
        self._transformer = pipe.transformer if pipe.transformer is not None else pipe.transformer_2
        config, ratio = self._transformer.config, pipe.config.boundary_ratio
        rows, columns = (pipe.vae_scale_factor_spatial * patch for patch in config.patch_size[1:])
        self.height, self.width = self.asked.height // rows * rows, self.asked.width // columns * columns
        self.frames = _whole_frames(self.asked.num_frames, pipe.vae_scale_factor_temporal)
        wanted = self.asked.num_frames, self.asked.height, self.asked.width
        if wanted != (self.frames, self.height, self.width):
            size = f"{self.frames} frames of {self.height} × {self.width}"
            logger.warning(f"WanPipeline draws {size}, not {wanted[0]} of {wanted[1]} × {wanted[2]}: latents and patches must be whole")
        self.guided = self.asked.guidance_scale > 1.0
        self._boundary = None if ratio is None else ratio * pipe.scheduler.config.num_train_timesteps

    def check_inputs(self, prompts, negatives) -> None:
        self.pipe.check_inputs(
            prompts, negatives, self.asked.height, self.asked.width, guidance_scale_2=self.asked.guidance_scale_2
        )

    def schedule(self) -> None:
        self.pipe.scheduler.set_timesteps(self.asked.num_inference_steps, device=self.device)

    def encode(self, prompts, negatives) -> tuple[dict, dict | None]:
        positive, negative = self.pipe.encode_prompt(
            prompt=prompts,
            negative_prompt=negatives,
            do_classifier_free_guidance=self.guided,
            max_sequence_length=self.asked.max_sequence_length,
            device=self.device,
        )
        dtype = self._transformer.dtype
        conditions = {"encoder_hidden_states": positive.to(dtype)}
        return conditions, {"encoder_hidden_states": negative.to(dtype)} if self.guided else None

    def latents(self, dtype, generators) -> torch.Tensor:
        size = self.height, self.width, self.frames
        channels = self._transformer.config.in_channels
        return self.pipe.prepare_latents(len(generators), channels, *size, torch.float32, self.device, generators)

    def guidance_scale(self, timesteps) -> float | list[float]:
        high, low = self.asked.guidance_scale, self.asked.guidance_scale_2
        if self._boundary is None or low is None:
            return high
        return [high if timestep >= self._boundary else low for timestep in timesteps]

    def denoise(self, model_input, timestep, conditions) -> torch.Tensor:
        high = self._boundary is None or bool(timestep >= self._boundary)
        transformer = self.pipe.transformer if high else self.pipe.transformer_2
        timesteps = timestep.expand(len(model_input))
        if self.pipe.config.expand_timesteps:  # one per token
            frames, height, width = model_input.shape[2:]
            tokens = frames * -(-height // 2) * -(-width // 2)
            timesteps = timesteps[:, None].expand(-1, tokens)
        return transformer(
            hidden_states=model_input.to(self._transformer.dtype), timestep=timesteps, **conditions, return_dict=False
        )[0]

    def decode(self, latents, generators) -> Any:
        pipe, vae = self.pipe, self.pipe.vae
        if self.asked.output_type == "latent":
            return latents
        latents = latents.to(vae.dtype)
        mean, inverse_std = torch.tensor(vae.config.latents_mean), 1.0 / torch.tensor(vae.config.latents_std)
        mean, inverse_std = (value.view(1, -1, 1, 1, 1).to(latents) for value in (mean, inverse_std))
        video = vae.decode(latents / inverse_std + mean, return_dict=False)[0]
        return pipe.video_processor.postprocess_video(video, output_type=self.asked.output_type)


def _whole_frames(frames: int, factor: int) -> int:
    """The number of frames that the pipeline makes of the one asked for: a multiple of `factor`, and one."""
    return max(1, frames if frames % factor == 1 else frames // factor * factor + 1)
