"""Image pipelines with a transformer and a language model for text encoder, in miniature."""

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from families.case import Family
from families.dits_parts import (
    GUIDANCE,
    SIZE,
    STEPS,
    apart,
    both,
    embeddings,
    even_sigmas,
    flow_shift,
    guided,
    length,
    masked_mean,
    noise,
    pack,
    pipeline,
    text,
)

LATENTS = (4, 8, 8)
TOKENS = 6  # of a prompt
IMAGE_TOKENS = 16  # of 2×2 latents
PROMPT = {"prompt_embeds": (TOKENS, 32)}


# ---- Qwen-Image


def qwen():
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(8, 4, 4),
    )
    return pipeline("QwenImagePipeline", transformer, FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))


def qwen_predict(pipe, x, t, c, s):
    """Guidance with the length of every token's prediction kept."""

    def call(prefix):
        return pipe.transformer(
            hidden_states=x,
            timestep=t.expand(1) / 1000,
            encoder_hidden_states=c[prefix + "prompt_embeds"],
            encoder_hidden_states_mask=c[prefix + "prompt_embeds_mask"],
            img_shapes=[[(1, 4, 4)]],
            return_dict=False,
        )[0]

    conditional, unconditional = call(""), call("negative_")
    combined = unconditional + GUIDANCE * (conditional - unconditional)
    return combined * conditional.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True)


# ---- Lumina 2


def lumina2():
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(128, 128, 128),
        cap_feat_dim=32,
    )
    return pipeline("Lumina2Pipeline", transformer, FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))


def lumina2_predict(pipe, x, t, c, s):
    """Guidance with the length of every row of pixels kept; time runs from noise (0) to picture (1)."""

    def call(prefix):
        return pipe.transformer(
            hidden_states=x,
            timestep=1 - t.expand(1) / 1000,
            encoder_hidden_states=c[prefix + "prompt_embeds"],
            encoder_attention_mask=c[prefix + "prompt_attention_mask"],
            return_dict=False,
        )[0]

    conditional, unconditional = call(""), call("negative_")
    combined = unconditional + GUIDANCE * (conditional - unconditional)
    return -combined * conditional.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True)


# ---- Z-Image


def z_image():
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    return pipeline("ZImagePipeline", transformer, FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))


def z_image_conditions(pipe, pictures):
    """Prompts of different lengths, as lists."""

    def prompts(salt):
        return [embeddings([picture], salt, length(picture, salt, TOKENS), 32)[0] for picture in pictures]

    options = {"num_inference_steps": STEPS, "height": SIZE, "width": SIZE, "guidance_scale": GUIDANCE}
    return {**options, "prompt_embeds": prompts(1), "negative_prompt_embeds": prompts(2)}


def z_image_row(pipe, kwargs, i):
    return {name: kwargs[name][i][None] for name in ("prompt_embeds", "negative_prompt_embeds")}


def z_image_mean(members):
    """As long as the longest member, each token the mean of those that have it."""

    def mean(name):
        padded = torch.nn.utils.rnn.pad_sequence([member[name][0] for member in members], batch_first=True)
        lengths = torch.tensor([member[name].shape[1] for member in members])
        return masked_mean(padded, torch.arange(padded.shape[1]) < lengths[:, None])

    return {name: mean(name) for name in members[0]}


def z_image_predict(pipe, x, t, c, s):
    """The conditional row comes first, and guidance goes on from it."""
    prompts = [c["prompt_embeds"][0], c["negative_prompt_embeds"][0]]
    outputs = pipe.transformer([x[0][:, None]] * 2, (1000 - t.expand(2)) / 1000, prompts, return_dict=False)[0]
    conditional, unconditional = outputs
    return -(conditional + GUIDANCE * (conditional - unconditional))[:, 0][None]


# ---- CogView4


def cogview4():
    transformer = diffusers.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=3,
        text_embed_dim=32,
        time_embed_dim=16,
        condition_dim=8,
        sample_size=8,
        rope_axes_dim=(16, 16),
    )
    shifts = {"base_shift": 0.25, "max_shift": 0.75, "time_shift_type": "linear"}
    return pipeline("CogView4Pipeline", transformer, FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **shifts))


def cogview4_setup(pipe, scheduler):
    timesteps = torch.linspace(1000, 1, STEPS).long().float()
    scheduler.set_timesteps(timesteps=timesteps.numpy(), sigmas=(timesteps / 1000).numpy(), mu=0.75 * (IMAGE_TOKENS / 256) ** 0.5 + 0.25)


@apart
def cogview4_predict(pipe, x, t, c, prefix):
    size = torch.full((1, 2), float(SIZE))
    return pipe.transformer(
        hidden_states=x,
        encoder_hidden_states=c[prefix + "prompt_embeds"],
        timestep=t.expand(1),
        original_size=size,
        target_size=size,
        crop_coords=torch.zeros(1, 2),
        return_dict=False,
    )[0]


# ---- HiDream


def hidream():
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[32, 32],
        text_emb_dim=16,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(8, 4, 4),
        max_resolution=(8, 8),
        llama_layers=[0, 1],
    )
    pipe = pipeline("HiDreamImagePipeline", transformer, FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe.default_sample_size = 8  # whatever size is asked for, it is scaled to as many pixels
    return pipe


def hidream_text() -> dict:
    """The language model's layers come before the pictures in its embeddings."""
    embeds = {"prompt_embeds_t5": (TOKENS, 32), "prompt_embeds_llama3": (2, TOKENS, 32), "pooled_prompt_embeds": (16,)}
    plain = text(embeds, guidance_scale=GUIDANCE)

    def swapped(kwargs):
        names = ("prompt_embeds_llama3", "negative_prompt_embeds_llama3")
        return {**kwargs, **{name: kwargs[name].transpose(0, 1) for name in names}}

    return {
        "conditions": lambda pipe, pictures: swapped(plain["conditions"](pipe, pictures)),
        "row": lambda pipe, kwargs, i: plain["row"](pipe, swapped(kwargs), i),
        "mean": plain["mean"],
    }


def hidream_predict(pipe, x, t, c, s):
    output = pipe.transformer(
        hidden_states=x.repeat(2, 1, 1, 1),
        timesteps=t.expand(2),
        encoder_hidden_states_t5=both(c, "prompt_embeds_t5"),
        encoder_hidden_states_llama3=both(c, "prompt_embeds_llama3").transpose(0, 1),
        pooled_embeds=both(c, "pooled_prompt_embeds"),
        return_dict=False,
    )[0]
    return guided(-output)


FAMILIES = [
    Family(
        name="Qwen-Image",
        pipeline="QwenImagePipeline",
        build=qwen,
        start=noise(*LATENTS, pack=pack),
        predict=qwen_predict,
        scheduler_setup=even_sigmas(flow_shift(IMAGE_TOKENS)),
        **text(PROMPT, {"prompt_embeds_mask": "prompt_embeds"}, true_cfg_scale=GUIDANCE),
    ),
    Family(
        name="Lumina 2",
        pipeline="Lumina2Pipeline",
        build=lumina2,
        start=noise(*LATENTS),
        predict=lumina2_predict,
        scheduler_setup=even_sigmas(flow_shift(LATENTS[0])),
        **text(PROMPT, {"prompt_attention_mask": "prompt_embeds"}, guidance_scale=GUIDANCE),
    ),
    Family(
        name="Z-Image",
        pipeline="ZImagePipeline",
        build=z_image,
        start=noise(*LATENTS),
        predict=z_image_predict,
        scheduler_setup=even_sigmas(flow_shift(IMAGE_TOKENS)),
        conditions=z_image_conditions,
        row=z_image_row,
        mean=z_image_mean,
    ),
    Family(
        name="CogView4",
        pipeline="CogView4Pipeline",
        build=cogview4,
        start=noise(*LATENTS),
        predict=cogview4_predict,
        scheduler_setup=cogview4_setup,
        **text(PROMPT, guidance_scale=GUIDANCE),
    ),
    Family(
        name="HiDream",
        pipeline="HiDreamImagePipeline",
        build=hidream,
        start=noise(*LATENTS),
        predict=hidream_predict,
        **hidream_text(),
    ),
]
