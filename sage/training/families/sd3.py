"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from sage.training.families.base import Family


class StableDiffusion3(Family):
    """`StableDiffusion3Pipeline`."""

    denoiser_name = "transformer"
    lora_targets = (
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "attn.to_k",
        "attn.to_out.0",
        "attn.to_q",
        "attn.to_v",
    )
    call_arguments = ("clip_skip", "max_sequence_length")

    def _scaled(self, latents):
        return super()._scaled(latents - self.pipe.vae.config.shift_factor)

    def _conditions(self, captions, guided):
        tokens, empty, pooled, empty_pooled = self.pipe.encode_prompt(
            prompt=captions,
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=guided,
            device=self.pipe._execution_device,
            **self.asked,
        )
        conditions = {"encoder_hidden_states": tokens, "pooled_projections": pooled}
        return conditions, {"encoder_hidden_states": empty, "pooled_projections": empty_pooled} if guided else None

    def _denoise(self, module, latents, timesteps, conditions):
        return module(hidden_states=latents, timestep=timesteps, **conditions, return_dict=False)[0]
