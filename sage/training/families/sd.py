"""Stable Diffusion 1.x and 2.x, and Stable Diffusion XL."""

from __future__ import annotations

import torch

from sage.training.families.base import Family


class StableDiffusion(Family):
    """`StableDiffusionPipeline`."""

    denoiser_name = "unet"
    call_arguments = ("clip_skip",)

    def __init__(self, pipe, **call_arguments):
        super().__init__(pipe, **call_arguments)
        if pipe.unet.config.time_cond_proj_dim is not None:
            raise NotImplementedError(
                f"{type(pipe).__name__}: this U-Net is told the guidance scale (time_cond_proj_dim = {pipe.unet.config.time_cond_proj_dim}), as "
                "latent consistency models are; train the model that it was distilled from"
            )

    def _conditions(self, captions, guided):
        tokens, empty = self.pipe.encode_prompt(captions, self.pipe._execution_device, 1, guided, **self.asked)
        return {"encoder_hidden_states": tokens}, {"encoder_hidden_states": empty} if guided else None

    def _denoise(self, module, latents, timesteps, conditions):
        return module(latents, timesteps, encoder_hidden_states=conditions["encoder_hidden_states"], return_dict=False)[0]


class StableDiffusionXL(StableDiffusion):
    """`StableDiffusionXLPipeline`."""

    def _scaled(self, latents):
        config = self.pipe.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return super()._scaled(latents)
        mean, std = (torch.tensor(value).view(1, -1, 1, 1).to(latents) for value in (mean, std))
        return (latents - mean) * config.scaling_factor / std

    def _conditions(self, captions, guided):
        tokens, empty, pooled, empty_pooled = self.pipe.encode_prompt(
            prompt=captions, device=self.pipe._execution_device, do_classifier_free_guidance=guided, **self.asked
        )
        conditions = {"encoder_hidden_states": tokens, "text_embeds": pooled}
        return conditions, {"encoder_hidden_states": empty, "text_embeds": empty_pooled} if guided else None

    def size_conditions(self, rows, height, width):
        """`time_ids` [rows, 6]: original height and width, top and left of the crop, target height and width [pixels]."""
        return {"time_ids": torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32).expand(rows, 6)}

    def _denoise(self, module, latents, timesteps, conditions):
        return module(
            latents,
            timesteps,
            encoder_hidden_states=conditions["encoder_hidden_states"],
            added_cond_kwargs={name: conditions[name] for name in ("text_embeds", "time_ids")},
            return_dict=False,
        )[0]
