"""Flux 1: packed latents, position ids, and in its distilled form guidance as a number that the transformer is told."""

from __future__ import annotations

import torch

from sage.training.families.base import Family


class Flux(Family):
    """`FluxPipeline`.

    A guidance-distilled transformer is told `guidance_scale`, the one that sampling will be done with, in every row.
    """

    denoiser_name = "transformer"
    lora_targets = (
        "attn.to_k",
        "attn.to_q",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    )
    call_arguments = ("guidance_scale", "max_sequence_length")

    def _scaled(self, latents):
        return super()._scaled(latents - self.pipe.vae.config.shift_factor)

    def _conditions(self, captions, guided):
        """Without a caption: the empty text, which is what true guidance by an empty negative prompt has."""
        tokens, pooled, _ = self.pipe.encode_prompt(
            prompt=captions, device=self.pipe._execution_device, max_sequence_length=self.asked["max_sequence_length"]
        )
        conditions = {"encoder_hidden_states": tokens, "pooled_projections": pooled}
        return conditions, self._conditions([""] * len(captions), guided=False)[0] if guided else None

    def _denoise(self, module, latents, timesteps, conditions):
        rows, channels, height, width = latents.shape
        if height % 2 or width % 2:
            raise ValueError(f"latents must have even sides, which are packed 2 × 2, got {height} × {width}")
        device, dtype, pipe = latents.device, latents.dtype, self.pipe
        guidance = None
        if self.denoiser.config.guidance_embeds:
            guidance = torch.full([rows], self.asked["guidance_scale"], device=device, dtype=torch.float32)
        output = module(
            hidden_states=pipe._pack_latents(latents, rows, channels, height, width),
            timestep=timesteps.to(dtype) / 1000,
            guidance=guidance,
            txt_ids=torch.zeros(conditions["encoder_hidden_states"].shape[1], 3, device=device, dtype=dtype),
            img_ids=pipe._prepare_latent_image_ids(rows, height // 2, width // 2, device, dtype),
            **conditions,
            return_dict=False,
        )[0]
        return pipe._unpack_latents(output, height * pipe.vae_scale_factor, width * pipe.vae_scale_factor, pipe.vae_scale_factor)
