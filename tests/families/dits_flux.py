"""Flux, its editing and control variants, Chroma and Flux 2, in miniature: packed latents, position ids, distilled guidance."""

import diffusers
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from tiny import randomise

from families.case import SEEDS, Family
from families.dits_parts import GUIDANCE, SIZE, apart, embeddings, even_sigmas, flow_shift, noise, pack, pipeline, text

TOKENS = 6  # of a prompt
SIDE = 4  # packed latents are SIDE × SIDE tokens
CHANNELS = 4
LATENTS = (1, CHANNELS, 2 * SIDE, 2 * SIDE)  # before packing
DISTILLED = 3.5
EMBEDS = {"prompt_embeds": (TOKENS, 32), "pooled_prompt_embeds": (16,)}
ENCODED_SIZE, ENCODED_FACTOR = 16, 2  # pixels, and how many of them make a latent


def flux(name="FluxPipeline", channels=4 * CHANNELS, out_channels=None, guidance_embeds=True, **parts):
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=channels,
        out_channels=out_channels,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=guidance_embeds,
    )
    return pipeline(name, transformer, FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), **parts)


def positions(image: int = 0) -> torch.Tensor:
    """[SIDE², 3]: number of the image, row, column."""
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    return torch.stack([torch.full_like(rows, image), rows, columns], dim=-1).reshape(-1, 3).float()


def call(pipe, x, t, c, prefix="", ids=None):
    return pipe.transformer(
        hidden_states=x,
        timestep=t.expand(1) / 1000,
        guidance=torch.full([1], DISTILLED) if pipe.transformer.config.guidance_embeds else None,
        pooled_projections=c[prefix + "pooled_prompt_embeds"],
        encoder_hidden_states=c[prefix + "prompt_embeds"],
        txt_ids=torch.zeros(TOKENS, 3),
        img_ids=positions() if ids is None else ids,
        return_dict=False,
    )[0]


def predict(pipe, x, t, c, s):
    return call(pipe, x, t, c)


# ---- images beside the latents


def kontext_image() -> torch.Tensor:
    """[1, 16, 8, 8]: latents of the picture to edit."""
    return embeddings([0], 50, 16, 2 * SIDE, 2 * SIDE)


def kontext_predict(pipe, x, t, c, s):
    tokens, ids = torch.cat([x, pack(kontext_image())], dim=1), torch.cat([positions(), positions(1)])
    return call(pipe, tokens, t, c, ids=ids)[:, : x.shape[1]]


def narrow_vae() -> AutoencoderKL:
    """An autoencoder of factor 2 whose latents vary little: each picture draws its own encoding of the same image."""
    vae = AutoencoderKL(
        block_out_channels=[4, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=CHANNELS,
        norm_num_groups=2,
        shift_factor=0.1,
        scaling_factor=0.4,
    )
    randomise(vae)
    with torch.no_grad():
        vae.quant_conv.weight[CHANNELS:] = 0
        vae.quant_conv.bias[CHANNELS:] = -10
    return vae


def encoded(pipe, image: torch.Tensor, generator) -> torch.Tensor:
    """[1, 16, 16]: packed latents of a picture [1, 3, 16, 16] in [-1, 1]."""
    latents = pipe.vae.encode(image).latent_dist.sample(generator)
    return pack((latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor)


def encoded_start(pipe, kwargs, generator):
    """The image's latents are drawn before the noise."""
    torch.randn(LATENTS, generator=generator)
    return pack(torch.randn(LATENTS, generator=generator))


def beside_image(image_of, images: dict, **options) -> dict:
    """The fields of a family whose transformer gets image tokens beside the latents' channels.

    Args:
        image_of: (pipe, generator of a picture) → those tokens.
        images: what the call is given for every picture, [1, ...] each.
    """
    plain = text(EMBEDS, negative=False, guidance_scale=DISTILLED, height=ENCODED_SIZE, width=ENCODED_SIZE, **options)

    def conditions(pipe, pictures):
        rows = {name: image.repeat(len(pictures), 1, 1, 1) for name, image in images.items()}
        return {**plain["conditions"](pipe, pictures), **rows}

    def row(pipe, kwargs, i):
        return {**plain["row"](pipe, kwargs, i), "image": image_of(pipe, torch.Generator().manual_seed(SEEDS[i]))}

    def mean(members):
        """A trunk has the first member's encoding."""
        texts = [{name: member[name] for name in EMBEDS} for member in members]
        return {**plain["mean"](texts), "image": members[0]["image"]}

    return {"conditions": conditions, "row": row, "mean": mean, "predict": beside_image_predict}


def beside_image_predict(pipe, x, t, c, s):
    return call(pipe, torch.cat([x, c["image"]], dim=2), t, c)


def picture(salt: int) -> torch.Tensor:
    """[1, 3, 16, 16] in [0, 1], one for each salt."""
    return embeddings([0], salt, 3, ENCODED_SIZE, ENCODED_SIZE).sigmoid()


def control_latents(pipe, generator):
    return encoded(pipe, 2 * picture(51) - 1, generator)


def fill_mask() -> torch.Tensor:
    """[1, 1, 16, 16]: one in the left half, which is filled."""
    mask = torch.zeros(1, 1, ENCODED_SIZE, ENCODED_SIZE)
    mask[..., : ENCODED_SIZE // 2] = 1
    return mask


def fill_latents(pipe, generator):
    """The rest of the picture, encoded after the picture and the noise are drawn, and the mask's pixels."""
    encoded_start(pipe, None, generator)
    rest = encoded(pipe, (2 * picture(52) - 1) * (1 - fill_mask()), generator)
    return torch.cat([rest, pack(torch.nn.functional.pixel_unshuffle(fill_mask(), ENCODED_FACTOR))], dim=2)


# ---- Chroma


def chroma():
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return pipeline("ChromaPipeline", transformer, FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))


@apart
def chroma_predict(pipe, x, t, c, prefix):
    return pipe.transformer(
        hidden_states=x,
        timestep=t.expand(1) / 1000,
        encoder_hidden_states=c[prefix + "prompt_embeds"],
        txt_ids=torch.zeros(TOKENS, 3),
        img_ids=positions(),
        attention_mask=torch.cat([c[prefix + "prompt_attention_mask"], torch.ones(1, SIDE**2)], dim=1),
        return_dict=False,
    )[0]


# ---- Flux 2


def flux2():
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        timestep_guidance_channels=16,
        axes_dims_rope=[4, 4, 4, 4],
    )
    return pipeline("Flux2Pipeline", transformer, FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))


def flux2_shift(tokens: int, steps: int) -> float:
    """Flux 2's mu: linear in the steps, between a line for 10 steps and one for 200."""
    at_10, at_200 = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    slope = (at_200 - at_10) / 190
    return at_200 - 200 * slope + slope * steps


def flux2_predict(pipe, x, t, c, s):
    text_positions = torch.zeros(1, TOKENS, 4)
    text_positions[..., 3] = torch.arange(TOKENS)
    return pipe.transformer(
        hidden_states=x,
        timestep=t.expand(1) / 1000,
        guidance=torch.full([1], DISTILLED),
        encoder_hidden_states=c["prompt_embeds"],
        txt_ids=text_positions,
        img_ids=torch.nn.functional.pad(positions(), (0, 1))[None],
        return_dict=False,
    )[0]


PACKED = noise(*LATENTS[1:], pack=pack)
SETUP = even_sigmas(flow_shift(SIDE**2))

FAMILIES = [
    Family(
        name="Flux",
        pipeline="FluxPipeline",
        build=flux,
        start=PACKED,
        predict=predict,
        scheduler_setup=SETUP,
        **text(EMBEDS, negative=False, guidance_scale=DISTILLED),
    ),
    Family(
        name="Flux true CFG",
        pipeline="FluxPipeline",
        build=lambda: flux(guidance_embeds=False),
        start=PACKED,
        predict=apart(call),
        scheduler_setup=SETUP,
        **text(EMBEDS, true_cfg_scale=GUIDANCE),
    ),
    Family(
        name="Flux Kontext",
        pipeline="FluxKontextPipeline",
        build=lambda: flux("FluxKontextPipeline", channels=64),
        start=noise(16, 2 * SIDE, 2 * SIDE, pack=pack),
        predict=kontext_predict,
        scheduler_setup=SETUP,
        **text(EMBEDS, negative=False, guidance_scale=DISTILLED, image=kontext_image(), max_area=SIZE**2, _auto_resize=False),
    ),
    Family(
        name="Flux Fill",
        pipeline="FluxFillPipeline",
        build=lambda: flux("FluxFillPipeline", 4 * (2 * CHANNELS + ENCODED_FACTOR**2), 4 * CHANNELS, vae=narrow_vae()),
        start=encoded_start,
        scheduler_setup=SETUP,
        **beside_image(fill_latents, {"image": picture(52), "mask_image": fill_mask()}, strength=1.0),
    ),
    Family(
        name="Flux Control",
        pipeline="FluxControlPipeline",
        build=lambda: flux("FluxControlPipeline", 8 * CHANNELS, 4 * CHANNELS, vae=narrow_vae()),
        start=encoded_start,
        scheduler_setup=SETUP,
        **beside_image(control_latents, {"control_image": 2 * picture(51) - 1}),
    ),
    Family(
        name="Chroma",
        pipeline="ChromaPipeline",
        build=chroma,
        start=PACKED,
        predict=chroma_predict,
        scheduler_setup=SETUP,
        **text(
            {"prompt_embeds": (TOKENS, 32)},
            {"prompt_attention_mask": "prompt_embeds"},
            mask_type=torch.float32,
            guidance_scale=GUIDANCE,
        ),
    ),
    Family(
        name="Flux 2",
        pipeline="Flux2Pipeline",
        build=flux2,
        start=noise(4 * CHANNELS, SIDE, SIDE, pack=lambda x: x.flatten(2).transpose(1, 2)),
        predict=flux2_predict,
        scheduler_setup=even_sigmas(flux2_shift(SIDE**2, 4)),
        **text({"prompt_embeds": (TOKENS, 32)}, negative=False, guidance_scale=DISTILLED),
    ),
]
