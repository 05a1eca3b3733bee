"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

from sage.native.base import Adapter


class StableDiffusion3(Adapter):
    """`StableDiffusion3Pipeline`."""

    arguments = (
        "height",
        "width",
        "num_inference_steps",
        "sigmas",
        "guidance_scale",
        "clip_skip",
        "max_sequence_length",
        "mu",
        "output_type",
    )

    def __init__(self, pipe, call_kwargs):
        super().__init__(pipe, call_kwargs)
        default = pipe.default_sample_size * pipe.vae_scale_factor
        self.height, self.width = self.asked.height or default, self.asked.width or default
        self.guided = self.asked.guidance_scale > 1

    def check_inputs(self, prompts, negatives) -> None:
        self.pipe.check_inputs(
            prompts,
            None,
            None,
            self.height,
            self.width,
            negative_prompt=negatives,
            max_sequence_length=self.asked.max_sequence_length,
        )

    def schedule(self) -> None:
        scheduler, asked, mu = self.pipe.scheduler, self.asked, self.asked.mu
        if mu is None and scheduler.config.get("use_dynamic_shifting", None):
            patch = self.pipe.vae_scale_factor * self.pipe.transformer.config.patch_size
            mu = calculate_shift(
                (self.height // patch) * (self.width // patch),
                scheduler.config.get("base_image_seq_len", 256),
                scheduler.config.get("max_image_seq_len", 4096),
                scheduler.config.get("base_shift", 0.5),
                scheduler.config.get("max_shift", 1.16),
            )
        shift = {} if mu is None else {"mu": mu}
        retrieve_timesteps(scheduler, asked.num_inference_steps, self.device, sigmas=asked.sigmas, **shift)

    def encode(self, prompts, negatives) -> tuple[dict, dict | None]:
        positive, negative, pooled, negative_pooled = self.pipe.encode_prompt(
            prompt=prompts,
            prompt_2=None,
            prompt_3=None,
            negative_prompt=negatives,
            do_classifier_free_guidance=self.guided,
            device=self.device,
            clip_skip=self.asked.clip_skip,
            max_sequence_length=self.asked.max_sequence_length,
        )
        conditions = {"encoder_hidden_states": positive, "pooled_projections": pooled}
        if not self.guided:
            return conditions, None
        return conditions, {"encoder_hidden_states": negative, "pooled_projections": negative_pooled}

    def latents(self, dtype, generators) -> torch.Tensor:
        channels = self.pipe.transformer.config.in_channels
        return self.pipe.prepare_latents(len(generators), channels, self.height, self.width, dtype, self.device, generators)

    def denoise(self, model_input, timestep, conditions) -> torch.Tensor:
        return self.pipe.transformer(
            hidden_states=model_input, timestep=timestep.expand(len(model_input)), **conditions, return_dict=False
        )[0]

    def decode(self, latents, generators) -> Any:
        pipe = self.pipe
        if self.asked.output_type == "latent":
            return latents
        latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        image = pipe.vae.decode(latents, return_dict=False)[0]
        return pipe.image_processor.postprocess(image, output_type=self.asked.output_type)
