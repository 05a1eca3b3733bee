"""PixArt-α and PixArt-Σ."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import (
    ASPECT_RATIO_256_BIN,
    ASPECT_RATIO_512_BIN,
    ASPECT_RATIO_1024_BIN,
)
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import ASPECT_RATIO_2048_BIN
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps

from sage.native.base import Adapter, NotNative

_BINS = {32: ASPECT_RATIO_256_BIN, 64: ASPECT_RATIO_512_BIN, 128: ASPECT_RATIO_1024_BIN, 256: ASPECT_RATIO_2048_BIN}


class PixArt(Adapter):
    """`PixArtAlphaPipeline` and `PixArtSigmaPipeline`."""

    arguments = (
        "height",
        "width",
        "num_inference_steps",
        "timesteps",
        "sigmas",
        "guidance_scale",
        "eta",
        "clean_caption",
        "use_resolution_binning",
        "max_sequence_length",
        "output_type",
    )

    def __init__(self, pipe, call_kwargs):
        super().__init__(pipe, call_kwargs)
        default = pipe.transformer.config.sample_size * pipe.vae_scale_factor
        self._wanted = self.asked.height or default, self.asked.width or default
        self.height, self.width = self._binned(*self._wanted) if self.asked.use_resolution_binning else self._wanted
        self.guided = self.asked.guidance_scale > 1.0
        self._told_sizes = pipe.transformer.config.sample_size == 128 and type(pipe).__name__ == "PixArtAlphaPipeline"

    def _binned(self, height: int, width: int) -> tuple[int, int]:
        """The size that the model was trained in, with nearly these proportions."""
        sample_size = self.pipe.transformer.config.sample_size
        if sample_size not in _BINS:
            raise ValueError(
                f"use_resolution_binning needs a transformer of sample_size {', '.join(map(str, _BINS))}, got {sample_size}; pass "
                "use_resolution_binning=False"
            )
        return self.pipe.image_processor.classify_height_width_bin(height, width, ratios=_BINS[sample_size])

    def check_inputs(self, prompts, negatives) -> None:
        self.pipe.check_inputs(prompts, self.height, self.width, negatives, 1)

    def schedule(self) -> None:
        asked = self.asked
        steps = retrieve_timesteps(self.pipe.scheduler, asked.num_inference_steps, self.device, asked.timesteps, asked.sigmas)[1]
        if steps == 1:
            raise NotNative(
                f"{type(self.pipe).__name__}: num_inference_steps = 1, for which the pipeline returns the denoised sample rather than "
                "the next; take two steps, or call the pipeline inside sage.enable"
            )

    def step_arguments(self, generators) -> dict[str, Any]:
        return self.pipe.prepare_extra_step_kwargs(generators, self.asked.eta)

    def encode(self, prompts, negatives) -> tuple[dict, dict | None]:
        if negatives is None:
            negatives = inspect.signature(type(self.pipe).__call__).parameters["negative_prompt"].default
        tokens, mask, negative_tokens, negative_mask = self.pipe.encode_prompt(
            prompts,
            self.guided,
            negative_prompt=negatives,
            device=self.device,
            clean_caption=self.asked.clean_caption,
            max_sequence_length=self.asked.max_sequence_length,
        )
        sizes = self._sizes(len(prompts), tokens.dtype) if self._told_sizes else {}
        conditions = {"encoder_hidden_states": tokens, "encoder_attention_mask": mask, **sizes}
        if not self.guided:
            return conditions, None
        return conditions, {"encoder_hidden_states": negative_tokens, "encoder_attention_mask": negative_mask, **sizes}

    def _sizes(self, count: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The size that the pictures are asked for in, [count, 2] and [count, 1]."""
        options = dict(dtype=dtype, device=self.device)
        resolution = torch.tensor([self.height, self.width], **options).repeat(count, 1)
        return {"resolution": resolution, "aspect_ratio": torch.tensor([self.height / self.width], **options).repeat(count, 1)}

    def latents(self, dtype, generators) -> torch.Tensor:
        channels = self.pipe.transformer.config.in_channels
        return self.pipe.prepare_latents(len(generators), channels, self.height, self.width, dtype, self.device, generators)

    def denoise(self, model_input, timestep, conditions) -> torch.Tensor:
        config = self.pipe.transformer.config
        output = self.pipe.transformer(
            model_input,
            encoder_hidden_states=conditions["encoder_hidden_states"],
            encoder_attention_mask=conditions["encoder_attention_mask"],
            timestep=timestep.expand(len(model_input)),
            added_cond_kwargs={name: conditions.get(name) for name in ("resolution", "aspect_ratio")},
            return_dict=False,
        )[0]
        learned_variance = config.out_channels // 2 == config.in_channels
        return output.chunk(2, dim=1)[0].contiguous() if learned_variance else output

    def decode(self, latents, generators) -> Any:
        pipe = self.pipe
        if self.asked.output_type == "latent":
            return latents
        image = pipe.vae.decode(latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor, return_dict=False)[0]
        if self.asked.use_resolution_binning:
            height, width = self._wanted
            image = pipe.image_processor.resize_and_crop_tensor(image, width, height)
        return pipe.image_processor.postprocess(image, output_type=self.asked.output_type)
