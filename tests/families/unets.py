"""Stable Diffusion, its relatives, and the other pipelines whose denoiser is a U-Net."""

import torch
from diffusers import (
    ControlNetModel,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import PAGCFGIdentitySelfAttnProcessor2_0
from tiny import randomise, stable_diffusion

from families import unet_xl
from families.case import Family
from families.unet_parts import (
    GUIDANCE,
    LATENT,
    STEPS,
    averages,
    doubled,
    encoded,
    guided,
    images,
    masks,
    noise,
    noisy_step,
    prompts,
    redrawn,
    relative,
    texts,
)

PAG_SCALE = 2.0
IMG2IMG_STEPS, STRENGTH = 6, 0.7  # 4 calls: int(6 × 0.7)
TEXT_MEANS = averages("positive", "negative")


def widened(**config) -> UNet2DConditionModel:
    """The tiny Stable Diffusion's U-Net with another configuration."""
    stock = stable_diffusion().unet
    unet = randomise(UNet2DConditionModel.from_config(stock.config, **config))
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.3)
    return unet


# ---- ControlNet


def controlnet(seed: int = 5) -> ControlNetModel:
    """Residuals of order one: in a released ControlNet the last convolutions are trained, not zero."""
    model = ControlNetModel.from_unet(stable_diffusion().unet, conditioning_embedding_out_channels=(4, 8))
    return randomise(model, seed)


def control_residuals(model, x, t, condition, scale=1.0, **options) -> dict:
    """What a ControlNet says about the doubled row, as keyword arguments of the U-Net."""
    image = torch.cat([condition["control"]] * 2)
    down, mid = model(
        torch.cat([x, x]),
        t,
        encoder_hidden_states=doubled(condition),
        controlnet_cond=image,
        conditioning_scale=scale,
        return_dict=False,
        **options,
    )
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}


def control_predict(pipe, x, t, condition, s):
    return guided(pipe, x, t, condition, s, **control_residuals(pipe.controlnet, x, t, condition))


# ---- inpainting and image to image


def inpaint_conditions(pipe, pictures):
    return {**prompts(pipe, pictures), "image": images(pictures), "mask_image": masks(pictures), "strength": 1.0}


def small_mask(kwargs, i) -> torch.Tensor:
    """The mask in latent pixels, nearest neighbour."""
    return kwargs["mask_image"][i : i + 1, :, ::2, ::2]


def inpaint_row(pipe, kwargs, i):
    """The nine-channel U-Net sees the mask and the latents of the picture without its masked part (grey, 0 in [−1, 1])."""
    masked = (2 * kwargs["image"][i : i + 1] - 1) * (1 - kwargs["mask_image"][i : i + 1])
    return {**texts(pipe, kwargs, i), "spatial": torch.cat([small_mask(kwargs, i), encoded(pipe, masked)], dim=1)}


def inpaint_predict(pipe, x, t, condition, s):
    return guided(pipe, torch.cat([x, condition["spatial"]], dim=1), t, condition, s)


def second_draw(pipe, kwargs, generator):
    """Pure noise, drawn after the posterior of the encoded picture."""
    return torch.randn(LATENT, generator=redrawn(generator, 1))


def keep_background(pipe, kwargs, x, s, scheduler, i, generator):
    """The four-channel way: after every step, the unmasked part is the picture's own, noised with the row's own noise."""
    background = encoded(pipe, 2 * kwargs["image"][i : i + 1] - 1)
    if s + 1 < STEPS:
        background = scheduler.add_noise(background, second_draw(pipe, kwargs, generator), scheduler.timesteps[s + 1 : s + 2])
    mask = small_mask(kwargs, i)
    return (1 - mask) * background + mask * x


def img2img_conditions(pipe, pictures):
    return {**prompts(pipe, pictures), "image": images(pictures), "strength": STRENGTH, "num_inference_steps": IMG2IMG_STEPS}


def img2img_schedule(pipe, scheduler):
    scheduler.set_timesteps(IMG2IMG_STEPS)
    scheduler.timesteps = scheduler.timesteps[IMG2IMG_STEPS - STEPS :]


def img2img_start(pipe, kwargs, generator):
    """The encoded image, noised to where the loop begins; the posterior is drawn before the noise."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    img2img_schedule(pipe, scheduler)
    return scheduler.add_noise(encoded(pipe, 2 * kwargs["image"] - 1), second_draw(pipe, kwargs, generator), scheduler.timesteps[:1])


# ---- perturbed attention guidance, latent consistency


def pag_predict(pipe, x, t, condition, s):
    """Three rows: without the prompt, with it, and with it but with the middle block's self-attention left out."""
    original = dict(pipe.unet.attn_processors)
    perturbed = {
        name: PAGCFGIdentitySelfAttnProcessor2_0() if "mid_block" in name and "attn1" in name else processor
        for name, processor in original.items()
    }
    pipe.unet.set_attn_processor(perturbed)
    embeds = torch.cat([condition["negative"], condition["positive"], condition["positive"]])
    uncond, cond, astray = pipe.unet(torch.cat([x] * 3), t, encoder_hidden_states=embeds).sample.chunk(3)
    pipe.unet.set_attn_processor(original)
    return uncond + GUIDANCE * (cond - uncond) + PAG_SCALE * (cond - astray)


def lcm_pipeline():
    """Without a second row nothing amplifies what the prompt says: cross-attention does."""
    stock = stable_diffusion().components
    unet, scheduler = widened(time_cond_proj_dim=16), LCMScheduler.from_config(stock["scheduler"].config)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "attn2.to_out.0.weight" in name:
                parameter.mul_(5)
    pipe = LatentConsistencyModelPipeline(**{**stock, "unet": unet, "scheduler": scheduler}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def lcm_conditions(pipe, pictures):
    conditions = prompts(pipe, pictures)
    del conditions["negative_prompt"]
    return conditions


def lcm_row(pipe, kwargs, i):
    return {"positive": pipe.encode_prompt(kwargs["prompt"][i], "cpu", 1, False)[0]}


def lcm_predict(pipe, x, t, condition, s):
    """No second row: the guidance scale is an argument of the U-Net."""
    scale = pipe.get_guidance_scale_embedding(torch.tensor([GUIDANCE - 1]), embedding_dim=16)
    return pipe.unet(x, t, encoder_hidden_states=condition["positive"], timestep_cond=scale).sample


STABLE_DIFFUSION = Family(
    name="Stable Diffusion",
    pipeline="StableDiffusionPipeline",
    build=stable_diffusion,
    conditions=prompts,
    start=noise,
    predict=guided,
    row=texts,
    mean=TEXT_MEANS,
)
CONTROLNET = Family(
    name="Stable Diffusion ControlNet",
    pipeline="StableDiffusionControlNetPipeline",
    build=lambda: relative(StableDiffusionControlNetPipeline, controlnet=controlnet()),
    conditions=lambda pipe, pictures: {**prompts(pipe, pictures), "image": images(pictures)},
    start=noise,
    predict=control_predict,
    row=lambda pipe, kwargs, i: {**texts(pipe, kwargs, i), "control": kwargs["image"][i : i + 1]},
    mean=TEXT_MEANS,
)
INPAINT = Family(
    name="Stable Diffusion inpaint (9 channels)",
    pipeline="StableDiffusionInpaintPipeline",
    build=lambda: relative(StableDiffusionInpaintPipeline, unet=widened(in_channels=9)),
    conditions=inpaint_conditions,
    start=noise,
    predict=inpaint_predict,
    row=inpaint_row,
    mean=TEXT_MEANS,
)
INPAINT_BACKGROUND = Family(
    name="Stable Diffusion inpaint (4 channels)",
    pipeline="StableDiffusionInpaintPipeline",
    build=lambda: relative(StableDiffusionInpaintPipeline),
    conditions=inpaint_conditions,
    start=second_draw,
    predict=guided,
    row=texts,
    mean=TEXT_MEANS,
    after_step=keep_background,
)
IMG2IMG = Family(
    name="Stable Diffusion img2img",
    pipeline="StableDiffusionImg2ImgPipeline",
    build=lambda: relative(StableDiffusionImg2ImgPipeline),
    conditions=img2img_conditions,
    start=img2img_start,
    predict=guided,
    row=texts,
    mean=TEXT_MEANS,
    scheduler_setup=img2img_schedule,
    steps=IMG2IMG_STEPS,
)
PAG = Family(
    name="Stable Diffusion PAG",
    pipeline="StableDiffusionPAGPipeline",
    build=lambda: relative(StableDiffusionPAGPipeline, pag_applied_layers="mid"),
    conditions=lambda pipe, pictures: {**prompts(pipe, pictures), "pag_scale": PAG_SCALE},
    start=noise,
    predict=pag_predict,
    row=texts,
    mean=TEXT_MEANS,
)
LCM = Family(
    name="Stable Diffusion LCM",
    pipeline="LatentConsistencyModelPipeline",
    build=lcm_pipeline,
    conditions=lcm_conditions,
    start=noise,
    predict=lcm_predict,
    row=lcm_row,
    mean=averages("positive"),
    step=noisy_step,
)
FAMILIES = [STABLE_DIFFUSION, *unet_xl.FAMILIES, CONTROLNET, INPAINT, INPAINT_BACKGROUND, IMG2IMG, PAG, LCM]
