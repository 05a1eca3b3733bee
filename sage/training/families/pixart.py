"""PixArt-α and PixArt-Σ."""

from __future__ import annotations

import torch
from diffusers import PixArtAlphaPipeline

from sage.training.families.base import Family


class PixArt(Family):
    """`PixArtAlphaPipeline` and `PixArtSigmaPipeline`."""

    denoiser_name = "transformer"
    call_arguments = ("clean_caption", "max_sequence_length")

    def _conditions(self, captions, guided):
        tokens, mask, empty, empty_mask = self.pipe.encode_prompt(captions, guided, device=self.pipe._execution_device, **self.asked)
        conditions = {"encoder_hidden_states": tokens, "encoder_attention_mask": mask}
        return conditions, {"encoder_hidden_states": empty, "encoder_attention_mask": empty_mask} if guided else None

    def size_conditions(self, rows, height, width):
        """`resolution` [rows, 2] in pixels and `aspect_ratio` [rows, 1], height / width: of PixArt-α with 1024 pixels."""
        if self.denoiser.config.sample_size != 128 or not isinstance(self.pipe, PixArtAlphaPipeline):
            return {}
        resolution = torch.tensor([height, width], dtype=torch.float32).expand(rows, 2)
        return {"resolution": resolution, "aspect_ratio": torch.full([rows, 1], height / width)}

    def _denoise(self, module, latents, timesteps, conditions):
        output = module(
            latents,
            encoder_hidden_states=conditions["encoder_hidden_states"],
            encoder_attention_mask=conditions["encoder_attention_mask"],
            timestep=timesteps,
            added_cond_kwargs={name: conditions.get(name) for name in ("resolution", "aspect_ratio")},
            return_dict=False,
        )[0]
        return output[:, : latents.shape[1]]  # the other half, if there is one, is a variance that sampling leaves out
