"""Stable Diffusion 1.x and 2.x, and Stable Diffusion XL."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg, retrieve_timesteps

from sage.native.base import Adapter, NotNative


class StableDiffusion(Adapter):
    """`StableDiffusionPipeline`."""

    arguments = (
        "height",
        "width",
        "num_inference_steps",
        "timesteps",
        "sigmas",
        "guidance_scale",
        "guidance_rescale",
        "eta",
        "clip_skip",
        "output_type",
    )

    def __init__(self, pipe, call_kwargs):
        super().__init__(pipe, call_kwargs)
        self.height, self.width = self.size()
        embedded = pipe.unet.config.time_cond_proj_dim  # the U-Net is told the guidance scale (latent consistency models)
        self.guided = self.asked.guidance_scale > 1 and embedded is None
        self._embedded_scale = None  # [1, time_cond_proj_dim]
        if embedded is not None:
            scale = pipe.get_guidance_scale_embedding(torch.tensor([self.asked.guidance_scale - 1.0]), embedding_dim=embedded)
            self._embedded_scale = scale.to(self.device)

    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        if self.asked.height and self.asked.width:
            return self.asked.height, self.asked.width
        default = self.pipe.unet.config.sample_size
        height, width = (default, default) if isinstance(default, int) else default
        return height * self.pipe.vae_scale_factor, width * self.pipe.vae_scale_factor

    def check_inputs(self, prompts, negatives) -> None:
        self.pipe.check_inputs(prompts, self.height, self.width, None, negatives)

    def check_probe(self) -> None:
        if self.guided and self.asked.guidance_rescale > 0:
            raise NotNative(
                f"{type(self.pipe).__name__}: guidance_rescale {self.asked.guidance_rescale} is part of the native denoiser's output, and "
                "a probe compares it before; use one without the other, or call the pipeline inside sage.enable"
            )

    def schedule(self) -> None:
        asked = self.asked
        retrieve_timesteps(self.pipe.scheduler, asked.num_inference_steps, self.device, asked.timesteps, asked.sigmas)

    def step_arguments(self, generators) -> dict[str, Any]:
        return self.pipe.prepare_extra_step_kwargs(generators, self.asked.eta)

    def encode(self, prompts, negatives) -> tuple[dict, dict | None]:
        positive, negative = self.pipe.encode_prompt(
            prompts, self.device, 1, self.guided, negatives, clip_skip=self.asked.clip_skip
        )
        return {"encoder_hidden_states": positive}, {"encoder_hidden_states": negative} if self.guided else None

    def latents(self, dtype, generators) -> torch.Tensor:
        channels = self.pipe.unet.config.in_channels
        return self.pipe.prepare_latents(len(generators), channels, self.height, self.width, dtype, self.device, generators)

    def denoise(self, model_input, timestep, conditions) -> torch.Tensor:
        scale = self._embedded_scale
        output = self.pipe.unet(
            model_input,
            timestep,
            encoder_hidden_states=conditions["encoder_hidden_states"],
            timestep_cond=None if scale is None else scale.to(model_input.dtype).expand(len(model_input), -1),
            added_cond_kwargs=self.added_conditions(conditions),
            return_dict=False,
        )[0]
        return self._rescaled(output) if self.guided and self.asked.guidance_rescale > 0 else output

    def added_conditions(self, conditions: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
        """What the U-Net takes inside `added_cond_kwargs`."""
        return None

    def _rescaled(self, output: torch.Tensor) -> torch.Tensor:
        """[2·R, ...] → [2·R, ...] with the guided and rescaled prediction in both halves, which the loop's guidance leaves as it is."""
        uncond, cond = output.chunk(2)
        guided = uncond + self.asked.guidance_scale * (cond - uncond)
        guided = rescale_noise_cfg(guided, cond, guidance_rescale=self.asked.guidance_rescale)
        return torch.cat([guided, guided])

    def decode(self, latents, generators) -> Any:
        pipe, output_type = self.pipe, self.asked.output_type
        image, flagged = latents, None
        if output_type != "latent":
            image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False, generator=generators)[0]
            image, flagged = pipe.run_safety_checker(image, self.device, latents.dtype)
        normalised = [True] * len(image) if flagged is None else [not unsafe for unsafe in flagged]
        return pipe.image_processor.postprocess(image, output_type=output_type, do_denormalize=normalised)


class StableDiffusionXL(StableDiffusion):
    """`StableDiffusionXLPipeline`.

    Sizes of the negative prompt's own (`negative_original_size` and so on) are not honoured: the pipeline repeats them in an
    order that gives them to every other row, whichever half it belongs to.
    """

    arguments = (*StableDiffusion.arguments, "original_size", "crops_coords_top_left", "target_size")

    def size(self) -> tuple[int, int]:
        default = self.pipe.default_sample_size * self.pipe.vae_scale_factor
        return self.asked.height or default, self.asked.width or default

    def check_inputs(self, prompts, negatives) -> None:
        self.pipe.check_inputs(prompts, None, self.height, self.width, None, negatives)

    def encode(self, prompts, negatives) -> tuple[dict, dict | None]:
        positive, negative, pooled, negative_pooled = self.pipe.encode_prompt(
            prompt=prompts,
            device=self.device,
            do_classifier_free_guidance=self.guided,
            negative_prompt=negatives,
            clip_skip=self.asked.clip_skip,
        )
        time_ids = self._time_ids(positive.dtype, pooled).to(self.device).repeat(len(prompts), 1)

        def conditions(tokens: torch.Tensor, text: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"encoder_hidden_states": tokens, "text_embeds": text, "time_ids": time_ids}

        return conditions(positive, pooled), conditions(negative, negative_pooled) if self.guided else None

    def _time_ids(self, dtype: torch.dtype, pooled: torch.Tensor) -> torch.Tensor:
        """[1, 6]: the sizes that the picture is asked for in."""
        pipe, asked, size = self.pipe, self.asked, (self.height, self.width)
        projected = pooled.shape[-1] if pipe.text_encoder_2 is None else pipe.text_encoder_2.config.projection_dim
        sizes = asked.original_size or size, asked.crops_coords_top_left, asked.target_size or size
        return pipe._get_add_time_ids(*sizes, dtype=dtype, text_encoder_projection_dim=int(projected))

    def added_conditions(self, conditions) -> dict[str, torch.Tensor]:
        return {name: conditions[name] for name in ("text_embeds", "time_ids")}

    def decode(self, latents, generators) -> Any:
        pipe, vae = self.pipe, self.pipe.vae
        if self.asked.output_type == "latent":
            return latents
        upcast = vae.dtype == torch.float16 and vae.config.force_upcast  # it overflows in half precision
        if upcast:
            vae.to(dtype=torch.float32)
            latents = latents.to(next(iter(vae.post_quant_conv.parameters())).dtype)
        image = vae.decode(self._unscaled(latents), return_dict=False)[0]
        if upcast:
            vae.to(dtype=torch.float16)
        if pipe.watermark is not None:
            image = pipe.watermark.apply_watermark(image)
        return pipe.image_processor.postprocess(image, output_type=self.asked.output_type)

    def _unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.pipe.vae.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is None or std is None:
            return latents / config.scaling_factor
        mean, std = (torch.tensor(value).view(1, -1, 1, 1).to(latents) for value in (mean, std))
        return latents * std / config.scaling_factor + mean
