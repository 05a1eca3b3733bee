"""Flux 1: distilled guidance as a number that the transformer is told, true guidance with a negative prompt."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps

from sage.native.base import Adapter


class Flux(Adapter):
    """`FluxPipeline`. Without a negative prompt there is no true guidance, whatever `true_cfg_scale`."""

    arguments = (
        "height",
        "width",
        "num_inference_steps",
        "sigmas",
        "guidance_scale",
        "true_cfg_scale",
        "max_sequence_length",
        "output_type",
    )
    guides_apart = True

    def __init__(self, pipe, call_kwargs):
        super().__init__(pipe, call_kwargs)
        default = pipe.default_sample_size * pipe.vae_scale_factor
        self.height, self.width = self.asked.height or default, self.asked.width or default
        self._text_ids = self._image_ids = self._guidance = None  # [tokens, 3] each, [1]

    def check_inputs(self, prompts, negatives) -> None:
        self.guided = self.asked.true_cfg_scale > 1 and negatives is not None
        self.pipe.check_inputs(
            prompts,
            None,
            self.height,
            self.width,
            negative_prompt=negatives,
            max_sequence_length=self.asked.max_sequence_length,
        )

    def schedule(self) -> None:
        scheduler, steps, sigmas = self.pipe.scheduler, self.asked.num_inference_steps, self.asked.sigmas
        if sigmas is None:
            sigmas = np.linspace(1.0, 1 / steps, steps)
        if getattr(scheduler.config, "use_flow_sigmas", False):
            sigmas = None
        patch = 2 * self.pipe.vae_scale_factor
        mu = calculate_shift(
            (self.height // patch) * (self.width // patch),
            scheduler.config.get("base_image_seq_len", 256),
            scheduler.config.get("max_image_seq_len", 4096),
            scheduler.config.get("base_shift", 0.5),
            scheduler.config.get("max_shift", 1.15),
        )
        retrieve_timesteps(scheduler, steps, self.device, sigmas=sigmas, mu=mu)

    def encode(self, prompts, negatives) -> tuple[dict, dict | None]:
        conditions = self._encoded(prompts)
        return conditions, self._encoded(negatives) if self.guided else None

    def _encoded(self, texts: list[str]) -> dict[str, torch.Tensor]:
        tokens, pooled, self._text_ids = self.pipe.encode_prompt(
            prompt=texts, device=self.device, max_sequence_length=self.asked.max_sequence_length
        )
        return {"encoder_hidden_states": tokens, "pooled_projections": pooled}

    def latents(self, dtype, generators) -> torch.Tensor:
        config = self.pipe.transformer.config
        if config.guidance_embeds:
            self._guidance = torch.full([1], self.asked.guidance_scale, device=self.device, dtype=torch.float32)
        latents, self._image_ids = self.pipe.prepare_latents(
            len(generators), config.in_channels // 4, self.height, self.width, dtype, self.device, generators
        )
        return latents

    def guidance_scale(self, timesteps) -> float:
        return self.asked.true_cfg_scale

    def denoise(self, model_input, timestep, conditions) -> torch.Tensor:
        rows = len(model_input)
        return self.pipe.transformer(
            hidden_states=model_input,
            timestep=timestep.expand(rows).to(model_input.dtype) / 1000,
            guidance=None if self._guidance is None else self._guidance.expand(rows),
            txt_ids=self._text_ids,
            img_ids=self._image_ids,
            **conditions,
            return_dict=False,
        )[0]

    def decode(self, latents, generators) -> Any:
        pipe = self.pipe
        if self.asked.output_type == "latent":
            return latents
        latents = pipe._unpack_latents(latents, self.height, self.width, pipe.vae_scale_factor)
        latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        image = pipe.vae.decode(latents, return_dict=False)[0]
        return pipe.image_processor.postprocess(image, output_type=self.asked.output_type)
