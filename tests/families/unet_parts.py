"""Parts that the U-Net families have in common: tiny models, pictures' conditions, and pieces of the loops by hand."""

import inspect

import torch
from diffusers import AutoencoderKL
from tiny import randomise, stable_diffusion
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from families.case import mean_of

STEPS, GUIDANCE = 4, 3.0
PIXELS, LATENT = 16, (1, 4, 8, 8)
IMAGE_WIDTH = 32  # of image embeddings


# ---- tiny models


def encoder() -> AutoencoderKL:
    """A VAE that encodes pictures to latents of order one, with a posterior of next to no spread.

    The pipelines draw from the posterior with each picture's generator; by hand its mean will do.
    """
    torch.manual_seed(2)
    vae = AutoencoderKL(
        block_out_channels=[4, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=2,
    )
    with torch.no_grad():
        vae.quant_conv.weight[:4].mul_(10)
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = -30
    return vae.eval()


def vision_encoder() -> CLIPVisionModelWithProjection:
    """An image embedding of `IMAGE_WIDTH` numbers."""
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        image_size=16,
        patch_size=8,
        projection_dim=IMAGE_WIDTH,
    )
    return randomise(CLIPVisionModelWithProjection(config), seed=4)


def relative(pipeline: type, **components):
    """A pipeline of another class from the tiny Stable Diffusion's components, with the VAE above."""
    accepted = inspect.signature(pipeline.__init__).parameters
    stock = {name: part for name, part in stable_diffusion().components.items() if name in accepted}
    pipe = pipeline(**{**stock, "vae": encoder(), **components}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---- conditions


def prompts(pipe, pictures: list[int]) -> dict:
    """A prompt and a negative prompt of its own for every picture."""
    return {
        "prompt": [f"picture {number}" for number in pictures],
        "negative_prompt": [f"no {number}" for number in pictures],
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
    }


def texts(pipe, kwargs: dict, i: int) -> dict:
    """Row i of the prompts' embeddings."""
    positive, negative = pipe.encode_prompt(kwargs["prompt"][i], "cpu", 1, True, kwargs["negative_prompt"][i])
    return {"positive": positive, "negative": negative}


def images(pictures: list[int], size: int = PIXELS) -> torch.Tensor:
    """[B, 3, size, size] in [0, 1]: one image for the even pictures and one for the odd ones, so that groups share theirs."""
    drawn = [torch.rand(3, size, size, generator=torch.Generator().manual_seed(70 + number % 2)) for number in pictures]
    return torch.stack(drawn)


def masks(pictures: list[int]) -> torch.Tensor:
    """[B, 1, 16, 16], 1 where to paint: the left half of the even pictures, the lower half of the odd ones."""
    mask = torch.zeros(len(pictures), 1, PIXELS, PIXELS)
    for row, number in zip(mask, pictures):
        if number % 2:
            row[:, PIXELS // 2 :] = 1
        else:
            row[:, :, : PIXELS // 2] = 1
    return mask


def encoded(pipe, image: torch.Tensor) -> torch.Tensor:
    """The latents of images in [0, 1] (or, already normalised, of a masked image)."""
    return pipe.vae.encode(image).latent_dist.mean * pipe.vae.config.scaling_factor


# ---- by hand


def averages(*names: str):
    """The condition of a trunk: the mean of the named entries, the first member's of all others."""
    return lambda rows: {name: mean_of(name, rows) if name in names else rows[0][name] for name in rows[0]}


def noise(pipe, kwargs, generator) -> torch.Tensor:
    """The initial latents of a solver that starts from unit noise."""
    return torch.randn(LATENT, generator=generator)


def redrawn(generator: torch.Generator, number: int, shape=LATENT) -> torch.Generator:
    """A generator that is about to make draw `number` of a picture's seed, whatever the given one has drawn already."""
    fresh = torch.Generator().manual_seed(generator.initial_seed())
    for _ in range(number):
        torch.randn(shape, generator=fresh)
    return fresh


def noisy_step(scheduler, output, t, x, generator) -> torch.Tensor:
    """A step that draws noise: step s makes the draw after the initial noise and those of the steps before it."""
    s = (scheduler.timesteps == t).nonzero().item()
    return scheduler.step(output, t, x, generator=redrawn(generator, 1 + s), return_dict=False)[0]


def doubled(condition: dict) -> torch.Tensor:
    return torch.cat([condition["negative"], condition["positive"]])


def guided(pipe, x, t, condition, s, guidance=GUIDANCE, **unet_kwargs) -> torch.Tensor:
    """Classifier-free guidance of one row."""
    output = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=doubled(condition), **unet_kwargs).sample
    uncond, cond = output.chunk(2)
    return uncond + guidance * (cond - uncond)
