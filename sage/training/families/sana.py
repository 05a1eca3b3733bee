"""Sana: a deterministic autoencoder of a high factor, and a language model that is given an instruction before the caption."""

from __future__ import annotations

from sage.training.families.base import Family


class Sana(Family):
    """`SanaPipeline`."""

    denoiser_name = "transformer"
    lora_targets = ("to_k", "to_q", "to_v")
    call_arguments = ("clean_caption", "complex_human_instruction", "max_sequence_length")

    def _encoded(self, pixels, generator):
        """There is no posterior: nothing is drawn from `generator`."""
        return self.pipe.vae.encode(pixels).latent

    def _conditions(self, captions, guided):
        tokens, mask, empty, empty_mask = self.pipe.encode_prompt(captions, guided, device=self.pipe._execution_device, **self.asked)
        conditions = {"encoder_hidden_states": tokens, "encoder_attention_mask": mask}
        return conditions, {"encoder_hidden_states": empty, "encoder_attention_mask": empty_mask} if guided else None

    def _denoise(self, module, latents, timesteps, conditions):
        output = module(
            latents,
            **conditions,
            timestep=timesteps * self.denoiser.config.timestep_scale,
            return_dict=False,
        )[0]
        return output[:, : latents.shape[1]]  # the other half, if there is one, is a variance that sampling leaves out
