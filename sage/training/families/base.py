"""What the pipeline families have in common for training; each family says how its latents and conditions are made and passed on."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from sage.families import RULES
from sage.rows import map_rows
from sage.training.families.schedule import NoiseSchedule
from sage.training.targets import Segments

Conditions = dict[str, torch.Tensor]  # the denoiser's argument name → [R, ...]


class Family:
    """A pipeline as training sees it.

    Latents are [R, C, H, W] of order one, as the sampler's are before any packing. Conditions go by the names of `sage.families.RULES`,
    one row per caption, also where the denoiser takes them inside another argument.

    Args:
        pipe: the pipeline. It is not changed.
        call_arguments: see `sage.training.families.family_for`.

    Attributes:
        denoiser_name: the pipeline's attribute that holds the denoiser.
        lora_targets: the modules that LoRA adapts by default, as `target_modules` of peft's `LoraConfig` takes them: those of
            diffusers' training scripts.
        call_arguments: the arguments of the pipeline's call that may be given.
        asked: their values.
        schedule: the `NoiseSchedule` of the pipeline's scheduler.
    """

    denoiser_name: str
    lora_targets: tuple[str, ...] = ("to_k", "to_q", "to_v", "to_out.0")
    call_arguments: tuple[str, ...] = ()

    def __init__(self, pipe, **call_arguments: Any):
        unknown = sorted(call_arguments.keys() - set(self.call_arguments))
        if unknown:
            raise TypeError(
                f"{type(pipe).__name__}: the call arguments that training knows are {', '.join(self.call_arguments)}, got {', '.join(unknown)}"
            )
        parameters = inspect.signature(type(pipe).__call__).parameters
        self.asked = {name: call_arguments.get(name, parameters[name].default) for name in self.call_arguments}
        self.pipe, self.schedule = pipe, NoiseSchedule(pipe.scheduler)

    @property
    def denoiser(self) -> torch.nn.Module:
        """The module that is trained."""
        return getattr(self.pipe, self.denoiser_name)

    @property
    def prediction_type(self) -> str:
        """What the denoiser predicts: "epsilon", "v_prediction", "sample" or "flow_prediction" (noise − x)."""
        return self.schedule.prediction_type

    @property
    def num_train_timesteps(self) -> int:
        """T: timesteps are in [0, T)."""
        return self.schedule.num_train_timesteps

    def levels(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha_t and sigma_t [R] of x_t = alpha_t·x + sigma_t·noise; see `NoiseSchedule.levels`."""
        return self.schedule.levels(timesteps)

    # ---- images

    @torch.no_grad()
    def encode_images(self, pixels: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None) -> torch.Tensor:
        """Pictures → latents, float32 [N, C, h, w], scaled and shifted as the sampler expects them.

        Args:
            pixels: [N, 3, H, W], floating point, in [−1, 1].
            generator: the latents are drawn from the encoder's posterior with it; None: the posterior's mode.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
            raise ValueError(f"pixels must be floating point [N, 3, H, W] in [-1, 1], got {pixels.dtype} {tuple(pixels.shape)}")
        vae = self.pipe.vae
        with _without_overflow(vae):
            latents = self._encoded(pixels.to(vae.device, vae.dtype), generator)
        return self._scaled(latents.float())

    def _encoded(self, pixels: torch.Tensor, generator) -> torch.Tensor:
        """What the autoencoder makes of pictures, before scaling."""
        posterior = self.pipe.vae.encode(pixels).latent_dist
        return posterior.mode() if generator is None else posterior.sample(generator)

    def _scaled(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of what the pipeline does to latents before it decodes them."""
        return latents * self.pipe.vae.config.scaling_factor

    # ---- conditions

    @torch.no_grad()
    def encode_prompts(self, captions: Sequence[str]) -> Conditions:
        """Captions → conditions, one row per caption, as the pipeline's call makes them."""
        if isinstance(captions, str):
            raise TypeError(f"captions must be a sequence of texts, got one text: [{captions!r}]?")
        return self._conditions(list(captions), guided=False)[0]

    @torch.no_grad()
    def encode_empty(self, rows: int) -> Conditions:
        """So many rows of what stands in for a dropped caption: what guidance starts from when no negative prompt is given.

        For some pipelines that is not ``encode_prompts([""])``: Stable Diffusion XL may have zeros, Sana leaves its instruction out.
        """
        empty = self._conditions([""], guided=True)[1]
        return {name: value.expand(rows, *value.shape[1:]) for name, value in empty.items()}

    def _conditions(self, captions: list[str], guided: bool) -> tuple[Conditions, Conditions | None]:
        """Conditions of the captions and, if `guided`, as many rows of those without a caption."""
        raise NotImplementedError

    def size_conditions(self, rows: int, height: int, width: int) -> Conditions:
        """Conditions that tell the denoiser the size of a picture in pixels; {} for most families.

        `predict` adds them for the latents' own size, which is what the sampler does by default. Where pictures were cropped or resized
        and the denoiser is to know, put rows of these names into the conditions yourself.
        """
        return {}

    def mean_conditions(self, conditions: Conditions, segments: Segments) -> Conditions:
        """The conditions of a group's shared row, by the rules that sampling uses (`sage.families.RULES`).

        Args:
            conditions: rows [B, ...] of the captions.
            segments: the nodes; rows may be in no node, or in several.

        Returns:
            One row per node.

        Raises:
            ValueError: a condition that must be alike inside a node differs.
        """
        rows = segments.partition

        def reduce(name: str, value: torch.Tensor, how: str, mask: torch.Tensor | None) -> torch.Tensor:
            pair = rows.alike(value, 1) if how == "alike" else None
            if pair is not None:
                first, second = (int(segments.rows[i]) for i in pair)
                raise ValueError(
                    f"conditions[{name!r}] differs between rows {first} and {second}, which one node consists of: group pictures of one size, "
                    f"or leave {name!r} out of the conditions"
                )
            return rows.reduce(value, how, 1, mask)

        gathered = {name: segments.gather(value) for name, value in conditions.items()}
        return map_rows(gathered, len(segments.rows), RULES, reduce)

    # ---- the denoiser

    def predict(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditions: Conditions,
        denoiser: torch.nn.Module | None = None,
    ) -> torch.Tensor:
        """The denoiser's output without guidance, in its own parametrisation (`prediction_type`).

        Args:
            latents: noisy, alpha_t·x + sigma_t·noise, [R, C, H, W].
            timesteps: [R], in [0, T).
            conditions: R rows of each.
            denoiser: called in the place of the pipeline's own: the same module inside a wrapper (several processes, a compiled graph).

        Returns:
            [R, C, H, W], in the latents' dtype; the denoiser itself computes in its own.
        """
        rows, dtype = len(latents), self.denoiser.dtype
        height, width = (side * self.pipe.vae_scale_factor for side in latents.shape[-2:])
        sizes = self.size_conditions(rows, height, width)
        given = {name: value.to(latents.device) for name, value in {**sizes, **conditions}.items()}
        for name, value in {"timesteps": timesteps, **given}.items():
            if value.ndim == 0 or len(value) != rows:
                raise ValueError(f"{name} must have {rows} rows, one per latent, got shape {tuple(value.shape)}")
        given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in given.items()}
        module = self.denoiser if denoiser is None else denoiser
        return self._denoise(module, latents.to(dtype), timesteps.to(latents.device), given).to(latents.dtype)

    def _denoise(self, module: torch.nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """The denoiser's call as the pipeline makes it, for latents and conditions in its dtype."""
        raise NotImplementedError


@contextlib.contextmanager
def _without_overflow(vae: torch.nn.Module) -> Iterator[None]:
    """In float32 while inside, where the autoencoder is one that overflows in half precision."""
    upcast = vae.dtype == torch.float16 and vae.config.get("force_upcast", False)
    if upcast:
        vae.to(dtype=torch.float32)
    try:
        yield
    finally:
        if upcast:
            vae.to(dtype=torch.float16)
