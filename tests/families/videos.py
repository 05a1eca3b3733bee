"""Video pipelines, in miniature: clips of two latent frames."""

import diffusers
import numpy as np
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule
from tiny import randomise

from families.case import Family
from families.dits_parts import GUIDANCE, STEPS, apart, both, even_sigmas, flow_shift, guided, noise, pipeline, text
from families.unet_parts import redrawn

TOKENS = 6  # of a prompt
CHANNELS, FRAMES, SIDE = 4, 2, 8  # of the latents
LOW_NOISE_GUIDANCE = 2.0
BOUNDARY = 0.95  # Wan 2.2 gives its second transformer everything after the first call
DISTILLED = 6.0


# ---- Wan


def wan_transformer(seed=0):
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return randomise(transformer, seed)


def wan(**parts):
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return pipeline("WanPipeline", wan_transformer(), scheduler, **parts)


def wan_call(transformer, x, t, c, guidance):
    def call(prefix):
        inputs = {"hidden_states": x, "timestep": t.expand(1), "encoder_hidden_states": c[prefix + "prompt_embeds"]}
        return transformer(**inputs, return_dict=False)[0]

    conditional, unconditional = call(""), call("negative_")
    return unconditional + guidance * (conditional - unconditional)


def wan_predict(pipe, x, t, c, s):
    return wan_call(pipe.transformer, x, t, c, GUIDANCE)


def wan22_predict(pipe, x, t, c, s):
    if t >= BOUNDARY * 1000:
        return wan_call(pipe.transformer, x, t, c, GUIDANCE)
    return wan_call(pipe.transformer_2, x, t, c, LOW_NOISE_GUIDANCE)


# ---- LTX-Video


def ltx():
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=32,
    )
    return pipeline("LTXPipeline", transformer, FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))


def ltx_predict(pipe, x, t, c, s):
    output = pipe.transformer(
        hidden_states=x.repeat(2, 1, 1),
        encoder_hidden_states=both(c, "prompt_embeds"),
        timestep=t.expand(2),
        encoder_attention_mask=both(c, "prompt_attention_mask"),
        num_frames=FRAMES,
        height=4,
        width=4,
        rope_interpolation_scale=(8 / 25, 32, 32),
        return_dict=False,
    )[0]
    return guided(output)


# ---- CogVideoX


def cogvideox(scheduler_class):
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        time_embed_dim=8,
        text_embed_dim=32,
        num_layers=2,
        sample_width=SIDE,
        sample_height=SIDE,
        sample_frames=5,
        max_text_seq_length=TOKENS,
        use_rotary_positional_embeddings=True,
    )
    scheduler = scheduler_class(timestep_spacing="trailing", rescale_betas_zero_snr=True, prediction_type="v_prediction")
    return pipeline("CogVideoXPipeline", transformer, scheduler)


def cogvideox_predict(pipe, x, t, c, s):
    output = pipe.transformer(
        hidden_states=x.repeat(2, 1, 1, 1, 1),
        encoder_hidden_states=both(c, "prompt_embeds"),
        timestep=t.expand(2),
        image_rotary_emb=get_3d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4), FRAMES),
        return_dict=False,
    )[0]
    return guided(output)


def cogvideox_setup(pipe, scheduler):
    scheduler.set_timesteps(STEPS)
    scheduler.last_picture = None  # the pipeline carries it from step to step


def cogvideox_dpm_step(scheduler, output, t, x, generator):
    """A step draws noise twice, except the first one and the last."""
    s = (scheduler.timesteps == t).nonzero().item()
    before = scheduler.timesteps[s - 1] if s else None
    drawn = redrawn(generator, 2 * s if s else 1, x.shape)
    x, scheduler.last_picture = scheduler.step(output, scheduler.last_picture, t, before, x, generator=drawn, return_dict=False)
    return x


# ---- HunyuanVideo


def hunyuan_video():
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=32,
        pooled_projection_dim=16,
        rope_axes_dim=(4, 6, 6),
    )
    return pipeline("HunyuanVideoPipeline", transformer, FlowMatchEulerDiscreteScheduler(shift=7.0))


def hunyuan_video_setup(pipe, scheduler):
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, STEPS + 1)[:-1])


@apart
def hunyuan_video_predict(pipe, x, t, c, prefix):
    return pipe.transformer(
        hidden_states=x,
        timestep=t.expand(1),
        encoder_hidden_states=c[prefix + "prompt_embeds"],
        encoder_attention_mask=c[prefix + "prompt_attention_mask"],
        pooled_projections=c[prefix + "pooled_prompt_embeds"],
        guidance=torch.tensor([DISTILLED * 1000]),
        return_dict=False,
    )[0]


# ---- Mochi


def mochi():
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=CHANNELS,
        text_embed_dim=32,
        time_embed_dim=8,
        max_sequence_length=TOKENS,
    )
    return pipeline("MochiPipeline", transformer, FlowMatchEulerDiscreteScheduler(invert_sigmas=True))


def mochi_setup(pipe, scheduler):
    scheduler.set_timesteps(sigmas=np.array(linear_quadratic_schedule(STEPS, 0.025)))


def mochi_predict(pipe, x, t, c, s):
    output = pipe.transformer(
        hidden_states=x.repeat(2, 1, 1, 1, 1),
        encoder_hidden_states=both(c, "prompt_embeds"),
        timestep=t.expand(2),
        encoder_attention_mask=both(c, "prompt_attention_mask"),
        return_dict=False,
    )[0]
    return guided(output)


PROMPT = {"prompt_embeds": (TOKENS, 32)}
HUNYUAN_EMBEDS = {**PROMPT, "pooled_prompt_embeds": (16,)}
MASKED = {"masks": {"prompt_attention_mask": "prompt_embeds"}}
CHANNELS_FIRST = noise(CHANNELS, FRAMES, SIDE, SIDE)
FRAMES_FIRST = noise(FRAMES, CHANNELS, SIDE, SIDE)

FAMILIES = [
    Family(
        name="Wan",
        pipeline="WanPipeline",
        build=wan,
        start=CHANNELS_FIRST,
        predict=wan_predict,
        **text(PROMPT, num_frames=5, guidance_scale=GUIDANCE),
    ),
    Family(
        name="Wan 2.2",
        pipeline="WanPipeline",
        build=lambda: wan(transformer_2=wan_transformer(seed=1), boundary_ratio=BOUNDARY),
        start=CHANNELS_FIRST,
        predict=wan22_predict,
        **text(PROMPT, num_frames=5, guidance_scale=GUIDANCE, guidance_scale_2=LOW_NOISE_GUIDANCE),
    ),
    Family(
        name="LTX-Video",
        pipeline="LTXPipeline",
        build=ltx,
        start=noise(CHANNELS, FRAMES, 4, 4, pack=lambda x: x.flatten(2).transpose(1, 2)),
        predict=ltx_predict,
        scheduler_setup=even_sigmas(flow_shift(FRAMES * 4 * 4)),
        **text(PROMPT, **MASKED, num_frames=9, height=128, width=128, frame_rate=25, guidance_scale=GUIDANCE),
    ),
    Family(
        name="CogVideoX",
        pipeline="CogVideoXPipeline",
        build=lambda: cogvideox(CogVideoXDPMScheduler),
        start=FRAMES_FIRST,
        predict=cogvideox_predict,
        scheduler_setup=cogvideox_setup,
        step=cogvideox_dpm_step,
        **text(PROMPT, num_frames=5, guidance_scale=GUIDANCE),
    ),
    Family(
        name="CogVideoX with DDIM",
        pipeline="CogVideoXPipeline",
        build=lambda: cogvideox(CogVideoXDDIMScheduler),
        start=FRAMES_FIRST,
        predict=cogvideox_predict,
        **text(PROMPT, num_frames=5, guidance_scale=GUIDANCE),
    ),
    Family(
        name="HunyuanVideo",
        pipeline="HunyuanVideoPipeline",
        build=hunyuan_video,
        start=CHANNELS_FIRST,
        predict=hunyuan_video_predict,
        scheduler_setup=hunyuan_video_setup,
        **text(HUNYUAN_EMBEDS, **MASKED, num_frames=5, guidance_scale=DISTILLED, true_cfg_scale=GUIDANCE),
    ),
    Family(
        name="Mochi",
        pipeline="MochiPipeline",
        build=mochi,
        start=CHANNELS_FIRST,
        predict=mochi_predict,
        scheduler_setup=mochi_setup,
        **text(PROMPT, **MASKED, mask_type=torch.bool, num_frames=7, guidance_scale=GUIDANCE),
    ),
]
