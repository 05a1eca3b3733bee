"""Image pipelines with a transformer, in miniature. Flux and its relatives, and those that read a language model, are beside."""

import diffusers
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.models.embeddings import get_2d_rotary_pos_embed

from families import dits_flux, dits_llm
from families.case import Family
from families.dits_parts import GUIDANCE, SIZE, both, guided, noise, pipeline, text

LATENTS = (4, 8, 8)
TOKENS = 6  # of a prompt
PROMPT = {"prompt_embeds": (TOKENS, 32)}
MASKED = {"masks": {"prompt_attention_mask": "prompt_embeds"}}
FLOW_SHIFT = 3.0
SKIP_SCALE = 2.0


# ---- Stable Diffusion 3


def sd3():
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
    )
    return pipeline("StableDiffusion3Pipeline", transformer, FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT))


def sd3_call(pipe, x, t, embeds, pooled, **options):
    inputs = {"hidden_states": x, "timestep": t.expand(len(x)), "encoder_hidden_states": embeds, "pooled_projections": pooled}
    return pipe.transformer(**inputs, **options, return_dict=False)[0]


def sd3_predict(pipe, x, t, c, s):
    return guided(sd3_call(pipe, x.repeat(2, 1, 1, 1), t, both(c, "prompt_embeds"), both(c, "pooled_prompt_embeds")))


def sd3_skip_predict(pipe, x, t, c, s):
    """From the second step on, the conditional prediction is pushed away from one without the first layer."""
    output = sd3_call(pipe, x.repeat(2, 1, 1, 1), t, both(c, "prompt_embeds"), both(c, "pooled_prompt_embeds"))
    if s == 0:
        return guided(output)
    skipped = sd3_call(pipe, x, t, c["prompt_embeds"], c["pooled_prompt_embeds"], skip_layers=[0])
    return guided(output) + SKIP_SCALE * (output[1:] - skipped)


SD3_EMBEDS = {"prompt_embeds": (TOKENS, 32), "pooled_prompt_embeds": (16,)}
SD3_SKIP = {
    "skip_guidance_layers": [0],
    "skip_layer_guidance_scale": SKIP_SCALE,
    "skip_layer_guidance_start": 0.0,
    "skip_layer_guidance_stop": 1.0,
}


# ---- PixArt


def pixart(name, sample_size):
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=sample_size,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        use_additional_conditions=sample_size == 128,
    )
    return pipeline(name, transformer, DPMSolverMultistepScheduler(prediction_type="v_prediction"))


def pixart_predict(pipe, x, t, c, s):
    sizes = {"resolution": None, "aspect_ratio": None}
    if pipe.transformer.config.sample_size == 128:
        sizes = {"resolution": torch.full((2, 2), float(SIZE)), "aspect_ratio": torch.ones(2, 1)}
    output = pipe.transformer(
        x.repeat(2, 1, 1, 1),
        encoder_hidden_states=both(c, "prompt_embeds"),
        encoder_attention_mask=both(c, "prompt_attention_mask"),
        timestep=t.expand(2),
        added_cond_kwargs=sizes,
        return_dict=False,
    )[0]
    return guided(output).chunk(2, dim=1)[0]


UNBINNED = {"use_resolution_binning": False, "guidance_scale": GUIDANCE, "negative_prompt": None}


# ---- Sana


def sana():
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=32,
        sample_size=8,
    )
    return pipeline("SanaPipeline", transformer, FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT))


def sana_predict(pipe, x, t, c, s):
    output = pipe.transformer(
        x.repeat(2, 1, 1, 1),
        encoder_hidden_states=both(c, "prompt_embeds"),
        encoder_attention_mask=both(c, "prompt_attention_mask"),
        timestep=t.expand(2),
        return_dict=False,
    )[0]
    return guided(output)


# ---- HunyuanDiT


def hunyuan_dit():
    transformer = diffusers.HunyuanDiT2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        in_channels=4,
        hidden_size=24,
        cross_attention_dim=32,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
        text_len=TOKENS,
        text_len_t5=TOKENS + 2,
    )
    return pipeline("HunyuanDiTPipeline", transformer, DDIMScheduler(prediction_type="v_prediction", clip_sample=False))


def hunyuan_dit_predict(pipe, x, t, c, s):
    output = pipe.transformer(
        x.repeat(2, 1, 1, 1),
        t.expand(2).float(),
        encoder_hidden_states=both(c, "prompt_embeds"),
        text_embedding_mask=both(c, "prompt_attention_mask"),
        encoder_hidden_states_t5=both(c, "prompt_embeds_2"),
        text_embedding_mask_t5=both(c, "prompt_attention_mask_2"),
        image_meta_size=torch.tensor([[1024.0, 1024.0, SIZE, SIZE, 0.0, 0.0]] * 2),
        style=torch.zeros(2, dtype=torch.long),
        image_rotary_emb=get_2d_rotary_pos_embed(8, ((0, 0), (32, 32)), (4, 4), output_type="pt"),
        return_dict=False,
    )[0]
    return guided(output.chunk(2, dim=1)[0])


HUNYUAN_EMBEDS = {"prompt_embeds": (TOKENS, 32), "prompt_embeds_2": (TOKENS + 2, 32)}
HUNYUAN_MASKS = {"prompt_attention_mask": "prompt_embeds", "prompt_attention_mask_2": "prompt_embeds_2"}


# ---- AuraFlow


def aura_flow():
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        out_channels=4,
        pos_embed_max_size=16,
    )
    pipe = pipeline("AuraFlowPipeline", transformer, FlowMatchEulerDiscreteScheduler(shift=1.73))
    with torch.no_grad():
        pipe.transformer.time_step_proj.linear_2.weight.mul_(8)  # gates of order one, so that the text gets through
    return pipe


def aura_flow_predict(pipe, x, t, c, s):
    inputs = {"encoder_hidden_states": both(c, "prompt_embeds"), "timestep": t.expand(2) / 1000}
    return guided(pipe.transformer(x.repeat(2, 1, 1, 1), **inputs, return_dict=False)[0])


def aura_flow_text():
    """The pipeline asks for token masks and gives its transformer none: the mean is plain."""
    return {**text(PROMPT, **MASKED, guidance_scale=GUIDANCE), "mean": text(PROMPT)["mean"]}


FAMILIES = [
    Family(
        name="Stable Diffusion 3",
        pipeline="StableDiffusion3Pipeline",
        build=sd3,
        start=noise(*LATENTS),
        predict=sd3_predict,
        **text(SD3_EMBEDS, guidance_scale=GUIDANCE),
    ),
    Family(
        name="SD3 skip-layer guidance",
        pipeline="StableDiffusion3Pipeline",
        build=sd3,
        start=noise(*LATENTS),
        predict=sd3_skip_predict,
        **text(SD3_EMBEDS, guidance_scale=GUIDANCE, **SD3_SKIP),
    ),
    *dits_flux.FAMILIES,
    *dits_llm.FAMILIES,
    Family(
        name="PixArt-alpha",
        pipeline="PixArtAlphaPipeline",
        build=lambda: pixart("PixArtAlphaPipeline", 128),
        start=noise(*LATENTS),
        predict=pixart_predict,
        **text(PROMPT, **MASKED, **UNBINNED),
    ),
    Family(
        name="PixArt-sigma",
        pipeline="PixArtSigmaPipeline",
        build=lambda: pixart("PixArtSigmaPipeline", 8),
        start=noise(*LATENTS),
        predict=pixart_predict,
        **text(PROMPT, **MASKED, **UNBINNED),
    ),
    Family(
        name="Sana",
        pipeline="SanaPipeline",
        build=sana,
        start=noise(*LATENTS),
        predict=sana_predict,
        **text(PROMPT, **MASKED, **UNBINNED, height=256, width=256),
    ),
    Family(
        name="HunyuanDiT",
        pipeline="HunyuanDiTPipeline",
        build=hunyuan_dit,
        start=noise(*LATENTS),
        predict=hunyuan_dit_predict,
        **text(HUNYUAN_EMBEDS, HUNYUAN_MASKS, **UNBINNED),
    ),
    Family(
        name="AuraFlow",
        pipeline="AuraFlowPipeline",
        build=aura_flow,
        start=noise(*LATENTS),
        predict=aura_flow_predict,
        **aura_flow_text(),
    ),
]
