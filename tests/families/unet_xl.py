"""Stable Diffusion XL, its refiner, and Kandinsky 2.2."""

import torch
from diffusers import (
    DDPMScheduler,
    EulerDiscreteScheduler,
    KandinskyV22CombinedPipeline,
    KandinskyV22Pipeline,
    PriorTransformer,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from tiny import randomise, tokenizer_and_vocabulary
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from families.case import Family
from families.unet_parts import (
    GUIDANCE,
    IMAGE_WIDTH,
    LATENT,
    PIXELS,
    STEPS,
    averages,
    encoder,
    images,
    noise,
    noisy_step,
    prompts,
    vision_encoder,
)

REFINER_STEPS, REFINER_START = 6, 0.4  # 4 calls
EMBEDS = ("positive", "negative", "pooled", "negative_pooled")


# ---- Stable Diffusion XL


def text_encoder(cls: type, vocabulary: dict[str, int], seed: int):
    config = CLIPTextConfig(
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
        hidden_size=32,
        projection_dim=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=len(vocabulary),
    )
    return randomise(cls(config), seed)


def xl_unet(cross_attention_dim: int, time_ids: int) -> UNet2DConditionModel:
    """Eight numbers embed each time id; the pooled text has 32."""
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=32 + 8 * time_ids,
        cross_attention_dim=cross_attention_dim,
        norm_num_groups=2,
    )
    randomise(unet)
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.3)
    return unet


def euler() -> EulerDiscreteScheduler:
    """XL's solver; predicting v keeps the latents of a random model of order one."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type="v_prediction",
    )


def xl_pipeline() -> StableDiffusionXLPipeline:
    tokenizer, vocabulary = tokenizer_and_vocabulary()
    pipe = StableDiffusionXLPipeline(
        vae=encoder(),
        text_encoder=text_encoder(CLIPTextModel, vocabulary, seed=1),
        text_encoder_2=text_encoder(CLIPTextModelWithProjection, vocabulary, seed=3),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=xl_unet(cross_attention_dim=64, time_ids=6),
        scheduler=euler(),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def refiner_pipeline() -> StableDiffusionXLImg2ImgPipeline:
    """One text encoder, and an aesthetic score instead of a target size."""
    tokenizer, vocabulary = tokenizer_and_vocabulary()
    pipe = StableDiffusionXLImg2ImgPipeline(
        vae=encoder(),
        text_encoder=None,
        text_encoder_2=text_encoder(CLIPTextModelWithProjection, vocabulary, seed=3),
        tokenizer=None,
        tokenizer_2=tokenizer,
        unet=xl_unet(cross_attention_dim=32, time_ids=5),
        scheduler=euler(),
        requires_aesthetics_score=True,
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def xl_texts(pipe, kwargs, i):
    """Row i of the prompts' embeddings, per token and pooled."""
    encoded = pipe.encode_prompt(kwargs["prompt"][i], device="cpu", negative_prompt=kwargs["negative_prompt"][i])
    return dict(zip(EMBEDS, encoded))


def xl_row(pipe, kwargs, i):
    """The time ids of a square picture, whole: (height, width, top, left, height, width)."""
    ids = torch.tensor([[PIXELS, PIXELS, 0, 0, PIXELS, PIXELS]], dtype=torch.float32)
    return {**xl_texts(pipe, kwargs, i), "time_ids": torch.cat([ids, ids])}


def refiner_row(pipe, kwargs, i):
    """(height, width, top, left, aesthetic score): 2.5 without the prompt and 6 with it."""
    ids = torch.tensor([[PIXELS, PIXELS, 0, 0, score] for score in (2.5, 6.0)])
    return {**xl_texts(pipe, kwargs, i), "time_ids": ids}


def schedule(pipe, steps: int):
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    return scheduler


def xl_predict(pipe, x, t, condition, s, steps=STEPS, **added):
    scaled = schedule(pipe, steps).scale_model_input(torch.cat([x, x]), t)
    pooled = torch.cat([condition["negative_pooled"], condition["pooled"]])
    uncond, cond = pipe.unet(
        scaled,
        t,
        encoder_hidden_states=torch.cat([condition["negative"], condition["positive"]]),
        added_cond_kwargs={"text_embeds": pooled, "time_ids": condition["time_ids"], **added},
    ).sample.chunk(2)
    return uncond + GUIDANCE * (cond - uncond)


def refiner_conditions(pipe, pictures):
    """The refiner goes on with latents: of order one times the noise level at which it starts."""
    own = prompts(pipe, pictures)
    latents = images(pictures, size=8).repeat(1, 2, 1, 1)[:, :4] * 6 - 3
    return {**own, "image": latents, "denoising_start": REFINER_START, "num_inference_steps": REFINER_STEPS}


def refiner_schedule(pipe, scheduler):
    scheduler.set_timesteps(REFINER_STEPS)
    scheduler.set_begin_index(REFINER_STEPS - STEPS)
    scheduler.timesteps = scheduler.timesteps[REFINER_STEPS - STEPS :]


# ---- Kandinsky 2.2


def movq() -> VQModel:
    torch.manual_seed(0)
    return VQModel(
        block_out_channels=[32, 64],
        down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        latent_channels=4,
        norm_num_groups=8,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    ).eval()


def kandinsky_unet() -> UNet2DConditionModel:
    """Conditioned on an image embedding alone, with a learned variance."""
    unet = UNet2DConditionModel(
        out_channels=8,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        encoder_hid_dim=IMAGE_WIDTH,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
        resnet_time_scale_shift="scale_shift",
    )
    return randomise(unet)


def kandinsky_scheduler() -> DDPMScheduler:
    return DDPMScheduler(
        beta_schedule="linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        thresholding=True,
        sample_max_value=2.0,
        variance_type="learned_range",
    )


def kandinsky_pipeline() -> KandinskyV22Pipeline:
    pipe = KandinskyV22Pipeline(unet=kandinsky_unet(), scheduler=kandinsky_scheduler(), movq=movq())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def kandinsky_combined() -> KandinskyV22CombinedPipeline:
    """Kandinsky's prior, which turns prompts into image embeddings, in front of the decoder."""
    tokenizer, vocabulary = tokenizer_and_vocabulary()
    prior = PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=8,
        embedding_dim=32,
        num_layers=1,
        num_embeddings=tokenizer.model_max_length,
        additional_embeddings=4,
    )
    pipe = KandinskyV22CombinedPipeline(
        **kandinsky_pipeline().components,
        prior_prior=randomise(prior, seed=6),
        prior_image_encoder=vision_encoder(),
        prior_text_encoder=text_encoder(CLIPTextModelWithProjection, vocabulary, seed=3),
        prior_tokenizer=tokenizer,
        prior_scheduler=UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0),
        prior_image_processor=None,
    )
    pipe.prior_pipe.set_progress_bar_config(disable=True)
    pipe.decoder_pipe.set_progress_bar_config(disable=True)
    return pipe


def kandinsky_conditions(pipe, pictures):
    positive, negative = (
        torch.stack([torch.randn(IMAGE_WIDTH, generator=torch.Generator().manual_seed(base + number)) for number in pictures])
        for base in (500, 600)
    )
    return {
        "image_embeds": positive,
        "negative_image_embeds": negative,
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "height": PIXELS,
        "width": PIXELS,
    }


def kandinsky_row(pipe, kwargs, i):
    return {"positive": kwargs["image_embeds"][i : i + 1], "negative": kwargs["negative_image_embeds"][i : i + 1]}


def kandinsky_predict(pipe, x, t, condition, s):
    """Guidance for the noise; the variance is the conditional row's."""
    embeds = torch.cat([condition["negative"], condition["positive"]])
    output = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=None, added_cond_kwargs={"image_embeds": embeds}).sample
    uncond, cond = output[:1, :4], output[1:, :4]
    return torch.cat([uncond + GUIDANCE * (cond - uncond), output[1:, 4:]], dim=1)


SDXL = Family(
    name="Stable Diffusion XL",
    pipeline="StableDiffusionXLPipeline",
    build=xl_pipeline,
    conditions=prompts,
    start=lambda pipe, kwargs, generator: torch.randn(LATENT, generator=generator) * schedule(pipe, STEPS).init_noise_sigma,
    predict=xl_predict,
    row=xl_row,
    mean=averages(*EMBEDS),
)
REFINER = Family(
    name="Stable Diffusion XL refiner",
    pipeline="StableDiffusionXLImg2ImgPipeline",
    build=refiner_pipeline,
    conditions=refiner_conditions,
    start=lambda pipe, kwargs, generator: kwargs["image"],
    predict=lambda pipe, x, t, condition, s: xl_predict(pipe, x, t, condition, s, REFINER_STEPS),
    row=refiner_row,
    mean=averages(*EMBEDS),
    scheduler_setup=refiner_schedule,
    steps=REFINER_STEPS,
)
KANDINSKY = Family(
    name="Kandinsky 2.2",
    pipeline="KandinskyV22Pipeline",
    build=kandinsky_pipeline,
    conditions=kandinsky_conditions,
    start=noise,
    predict=kandinsky_predict,
    row=kandinsky_row,
    mean=averages("positive", "negative"),
    step=noisy_step,
)
FAMILIES = [SDXL, REFINER, KANDINSKY]
