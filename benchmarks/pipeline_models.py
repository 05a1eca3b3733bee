"""Pipelines at the sizes of well-known models, with random weights, built from configurations: nothing is downloaded.

Text encoders and decoders are left out: a call is given random prompt embeddings and returns latents. Such a pipeline takes the
time and the memory that the real one's denoising takes; its pictures mean nothing.
"""

import os
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import torch

SD_EMBEDS = ("prompt_embeds", "negative_prompt_embeds")
POOLED = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
SPARE = 1.25  # of the weights' bytes: what must be free before a model is built
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass(frozen=True)
class Model:
    """A pipeline to build, and how to call it.

    Attributes:
        pipeline, denoiser: class names of diffusers.
        config: of the denoiser.
        scheduler: class name and config.
        embeds: argument of the pipeline's call → shape of a picture's row.
        order: what `pipe.encode_prompt` returns; "text_ids" are Flux's.
        sizes: name → arguments of the call.
        options: the call's other arguments.
        copies: guidance copies of a picture.
        together: copies in one denoiser call.
    """

    pipeline: str
    denoiser: str
    config: dict
    scheduler: tuple[str, dict]
    embeds: dict[str, tuple]
    order: tuple[str, ...]
    sizes: dict[str, dict]
    options: dict = field(default_factory=dict)
    copies: int = 2
    together: int = 2


def square(*sides: int) -> dict[str, dict]:
    return {str(side): {"height": side, "width": side} for side in sides}


def rows(names: tuple[str, ...], *shape: int) -> dict[str, tuple]:
    return dict.fromkeys(names, shape)


def video(height: int, width: int, frames: int) -> dict[str, int]:
    return {"height": height, "width": width, "num_frames": frames}


# v-prediction keeps the latents of a random U-Net of order one.
DPM = ("DPMSolverMultistepScheduler", {**NOISE, "prediction_type": "v_prediction", "steps_offset": 1})
SHIFTED = {"use_dynamic_shifting": True, "base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}

MODELS = {
    "sd15": Model(
        "StableDiffusionPipeline",
        "UNet2DConditionModel",
        {"sample_size": 64, "cross_attention_dim": 768},  # the rest are the defaults
        DPM,
        rows(SD_EMBEDS, 77, 768),
        SD_EMBEDS,
        square(512),
        {"guidance_scale": 7.5},
    ),
    "sdxl": Model(
        "StableDiffusionXLPipeline",
        "UNet2DConditionModel",
        {
            "sample_size": 128,
            "cross_attention_dim": 2048,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        DPM,
        rows(SD_EMBEDS, 77, 2048) | rows(POOLED, 1280),
        (*SD_EMBEDS, *POOLED),
        square(512, 1024),
        {"guidance_scale": 5.0},
    ),
    "sd3": Model(
        "StableDiffusion3Pipeline",
        "SD3Transformer2DModel",
        {"num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        rows(SD_EMBEDS, 333, 4096) | rows(POOLED, 2048),
        (*SD_EMBEDS, *POOLED),
        square(512, 1024),
        {"guidance_scale": 7.0},
    ),
    "flux": Model(
        "FluxPipeline",
        "FluxTransformer2DModel",
        {"guidance_embeds": True},
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, **SHIFTED}),
        rows(("prompt_embeds",), 512, 4096) | rows(("pooled_prompt_embeds",), 768),
        ("prompt_embeds", "pooled_prompt_embeds", "text_ids"),
        square(512, 1024),
        {"guidance_scale": 3.5},
        copies=1,
        together=1,
    ),
    "wan": Model(
        "WanPipeline",
        "WanTransformer3DModel",
        {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30},
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}),
        rows(SD_EMBEDS, 512, 4096),
        SD_EMBEDS,
        {"480p33": video(480, 832, 33), "480p81": video(480, 832, 81)},
        {"guidance_scale": 5.0},
        together=1,
    ),
}

NARROW = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 32}
NARROW |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
LITTLE = {"64": {"height": 64, "width": 64}}


def tiny(name: str, config: dict, embeds: dict[str, tuple], sizes: dict[str, dict] = LITTLE) -> Model:
    """A model in miniature: the same pipeline, a moment on any machine."""
    return replace(MODELS[name], config=MODELS[name].config | config, embeds=embeds, sizes=sizes)


TINY = {
    "sd15": tiny("sd15", {**NARROW, "sample_size": 8, "attention_head_dim": 4}, rows(SD_EMBEDS, 7, 32)),
    "sdxl": tiny(
        "sdxl",
        {
            **NARROW,
            "sample_size": 8,
            "attention_head_dim": (2, 4),
            "transformer_layers_per_block": (1, 2),
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 64,
        },
        rows(SD_EMBEDS, 7, 32) | rows(POOLED, 16),
    ),
    "sd3": tiny(
        "sd3",
        {
            "sample_size": 8,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "caption_projection_dim": 32,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 16,
        },
        rows(SD_EMBEDS, 7, 32) | rows(POOLED, 16),
    ),
    "flux": tiny(
        "flux",
        {
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 16,
            "axes_dims_rope": (4, 4, 8),
        },
        rows(("prompt_embeds",), 7, 32) | rows(("pooled_prompt_embeds",), 16),
    ),
    "wan": tiny(
        "wan",
        {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 32, "freq_dim": 32}
        | {"ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32},
        rows(SD_EMBEDS, 7, 32),
        {"64f5": video(64, 64, 5)},
    ),
}


def parameters(model: Model) -> int:
    """How many the denoiser has, without building it."""
    with torch.device("meta"):
        denoiser = getattr(diffusers, model.denoiser)(**model.config)
    return sum(p.numel() for p in denoiser.parameters())


def free_bytes(device: torch.device) -> int:
    """Memory of a GPU, or of this machine, that is free now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def refusal(model: Model, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the model is not built here; None if it fits."""
    needed, free = SPARE * parameters(model) * dtype.itemsize, free_bytes(device)
    if needed <= free:
        return None
    return f"needs about {needed / 1e9:.0f} GB of memory for {str(dtype)[6:]} weights and room to work, {free / 1e9:.0f} GB are free"


def build(model: Model, device: torch.device, dtype: torch.dtype) -> Any:
    """The pipeline, its denoiser made on the device in its final dtype."""
    default = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            denoiser = getattr(diffusers, model.denoiser)(**model.config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)
    denoiser = torch.nn.Module.to(denoiser, dtype)
    name, config = model.scheduler
    cls = getattr(diffusers, model.pipeline)
    given = {denoiser_name(model): denoiser, "scheduler": getattr(diffusers, name)(**config)}
    optional = {"requires_safety_checker": False} if model.pipeline == "StableDiffusionPipeline" else {}
    pipe = cls(**{part: None for part in cls._get_signature_keys(cls)[0]} | given, **optional)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def denoiser_name(model: Model) -> str:
    return "unet" if model.denoiser.startswith("UNet") else "transformer"


def conditions(model: Model, pictures: int, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random rows for every picture, by argument of the pipeline's call."""
    draw = torch.Generator(device).manual_seed(1)
    return {name: torch.randn(pictures, *shape, generator=draw, device=device).to(dtype) for name, shape in model.embeds.items()}
