"""IP-Adapter, ControlNets and T2I-Adapter on Stable Diffusion."""

from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionAdapterPipeline, StableDiffusionControlNetPipeline, StableDiffusionPipeline, T2IAdapter
from diffusers.models import MultiControlNetModel
from diffusers.models.attention_processor import IPAdapterAttnProcessor
from families.case import PICTURES, draw, shared_by_hand
from families.unet_parts import IMAGE_WIDTH, averages, guided, images, prompts, relative, texts, vision_encoder
from families.unets import CONTROLNET, STABLE_DIFFUSION, control_residuals, controlnet, widened
from measures import far, worst
from tiny import randomise
from variant_checks import BRANCH, LEAVES, check, flat, given

import sage
from sage import SharingPlan

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- IP-Adapter


class ImagePerPicture(StableDiffusionPipeline):
    """`ip_adapter_image_embeds` is [2·B, 1, width]: unlike in diffusers, an image of its own for every picture."""

    def prepare_ip_adapter_image_embeds(self, image, embeds, device, count, guided):
        return embeds


def ip_pipeline(cls, **components):
    """Random weights where a released IP-Adapter's go: keys and values of every cross-attention, and the projection."""
    pipe = relative(cls, **components)
    draw = torch.Generator().manual_seed(9)
    attention, width = {}, pipe.unet.config.cross_attention_dim
    for number, name in enumerate(name for name in pipe.unet.attn_processors if "attn2" in name):
        hidden = pipe.unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        for part in IPAdapterAttnProcessor(hidden, width).state_dict():
            key = part.replace(".0.", ".")
            attention[f"{2 * number + 1}.{key}"] = torch.randn(hidden, width, generator=draw) / width**0.5
    projection = {
        "proj.weight": torch.randn(4 * width, IMAGE_WIDTH, generator=draw) / IMAGE_WIDTH**0.5,
        "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": attention}])
    return pipe


def ip_predict(pipe, x, t, condition, s):
    embeds = torch.cat([condition["negative_image"], condition["image"]])
    return guided(pipe, x, t, condition, s, added_cond_kwargs={"image_embeds": [embeds]})


def image_embeds(count, seed=20):
    return torch.randn(count, 1, IMAGE_WIDTH, generator=torch.Generator().manual_seed(seed))


def test_ip_adapter_embeds():
    """One image for all pictures, given as [without, with] embeddings. Control: another image draws other pictures."""
    pipe, embeds = ip_pipeline(StableDiffusionPipeline), image_embeds(2)

    def row(pipe, kwargs, i):
        return {**texts(pipe, kwargs, i), "negative_image": embeds[:1], "image": embeds[1:]}

    family = replace(given(STABLE_DIFFUSION, ip_adapter_image_embeds=[embeds]), row=row, predict=ip_predict)
    stock, _ = check(family, pipe)
    assert far(stock, draw(given(STABLE_DIFFUSION, ip_adapter_image_embeds=[image_embeds(2, seed=21)]), pipe))


def test_ip_adapter_image():
    """One image for all pictures, embedded by the pipeline: by hand with its image encoder, zeros without guidance."""
    vision, image = vision_encoder(), images([0])
    pipe = ip_pipeline(StableDiffusionPipeline, image_encoder=vision)
    with torch.no_grad():
        embeds = vision(image).image_embeds[None]

    def row(pipe, kwargs, i):
        return {**texts(pipe, kwargs, i), "negative_image": torch.zeros_like(embeds), "image": embeds}

    stock, _ = check(replace(given(STABLE_DIFFUSION, ip_adapter_image=image), row=row, predict=ip_predict), pipe)
    assert far(stock, draw(given(STABLE_DIFFUSION, ip_adapter_image=images([1])), pipe))


def test_ip_adapter_embeds_are_averaged():
    """An image for each picture: a trunk runs under their mean. Control: under the representative's it is another one."""
    pipe, embeds = ip_pipeline(ImagePerPicture), image_embeds(2 * len(PICTURES))
    negatives, positives = embeds.split(len(PICTURES))

    def row(pipe, kwargs, i):
        return {**texts(pipe, kwargs, i), "negative_image": negatives[i : i + 1], "image": positives[i : i + 1]}

    means = averages("positive", "negative", "image", "negative_image")
    options = given(STABLE_DIFFUSION, ip_adapter_image_embeds=[embeds])
    family = replace(options, row=row, predict=ip_predict, mean=means)
    _, shared = check(family, pipe)
    first_ones = replace(family, mean=averages("positive", "negative"))
    assert worst(shared, shared_by_hand(first_ones, pipe, branch=BRANCH)) > 1e-4


# ---- ControlNet and T2I-Adapter


def test_controlnet_for_part_of_the_steps():
    """The ControlNet is run at every call and its residuals multiplied by zero from the second half on."""
    pipe = CONTROLNET.build()

    def predict(pipe, x, t, condition, s):
        residuals = control_residuals(pipe.controlnet, x, t, condition, scale=0.8 if s < 2 else 0.0)
        return guided(pipe, x, t, condition, s, **residuals)

    options = {"controlnet_conditioning_scale": 0.8, "control_guidance_end": 0.5}
    stock, _ = check(replace(given(CONTROLNET, **options), predict=predict), pipe)
    assert far(stock, draw(CONTROLNET, pipe))


def test_guess_mode():
    """The ControlNet sees the conditional rows alone (k = 1 there and 2 in the U-Net); without a prompt its share is zero."""
    pipe = CONTROLNET.build()

    def predict(pipe, x, t, condition, s):
        down, mid = pipe.controlnet(
            x, t, encoder_hidden_states=condition["positive"], controlnet_cond=condition["control"], guess_mode=True, return_dict=False
        )
        down, mid = [torch.cat([torch.zeros_like(d), d]) for d in down], torch.cat([torch.zeros_like(mid), mid])
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return guided(pipe, x, t, condition, s, **residuals)

    stock, _ = check(replace(given(CONTROLNET, guess_mode=True), predict=predict), pipe)
    assert far(stock, draw(CONTROLNET, pipe))


def two_controlnets():
    nets = [controlnet(5), controlnet(6)]
    return nets, relative(StableDiffusionControlNetPipeline, controlnet=MultiControlNetModel(nets))


def test_images_of_the_second_controlnet_that_differ_within_a_group_are_refused():
    """Control: with the same two lists of images, pictures that go their own ways equal stock."""
    _, pipe = two_controlnets()
    both = {"image": [images(PICTURES), images(PICTURES).roll(1, dims=0)], "controlnet_conditioning_scale": [0.8, 0.6]}
    with sage.enable(pipe, flat()), pytest.raises(ValueError, match="controlnet_cond"):
        draw(CONTROLNET, pipe, **both)
    expected = draw(CONTROLNET, pipe, **both)
    with sage.enable(pipe, SharingPlan.independent(LEAVES)):
        assert worst(draw(CONTROLNET, pipe, **both), expected) <= 1e-5


def test_two_controlnets():
    """By hand: the sum of their residuals. Control: the second one counts."""
    scales = [0.8, 0.6]
    nets, pipe = two_controlnets()

    def conditions(pipe, pictures):
        both = [images(pictures), 1 - images(pictures)]
        return {**prompts(pipe, pictures), "image": both, "controlnet_conditioning_scale": scales}

    def row(pipe, kwargs, i):
        first, second = (image[i : i + 1] for image in kwargs["image"])
        return {**texts(pipe, kwargs, i), "control": first, "second": second}

    def predict(pipe, x, t, condition, s):
        one = control_residuals(nets[0], x, t, condition, scales[0])
        two = control_residuals(nets[1], x, t, {**condition, "control": condition["second"]}, scales[1])
        down, mid = "down_block_additional_residuals", "mid_block_additional_residual"
        summed = {down: [a + b for a, b in zip(one[down], two[down])], mid: one[mid] + two[mid]}
        return guided(pipe, x, t, condition, s, **summed)

    family = replace(CONTROLNET, conditions=conditions, row=row, predict=predict)
    stock, _ = check(family, pipe)
    assert far(stock, draw(given(family, controlnet_conditioning_scale=[0.8, 0.0]), pipe))


def test_t2i_adapter():
    """The adapter runs once, before the loop; its features go into the U-Net at every call."""
    adapter = randomise(T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=2), seed=7)
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    pipe = relative(StableDiffusionAdapterPipeline, unet=widened(**blocks), adapter=adapter)

    def conditions(pipe, pictures):
        return {**prompts(pipe, pictures), "image": images(pictures), "adapter_conditioning_scale": 0.8}

    def predict(pipe, x, t, condition, s):
        features = [torch.cat([0.8 * state] * 2) for state in pipe.adapter(condition["control"])]
        return guided(pipe, x, t, condition, s, down_intrablock_additional_residuals=features)

    family = replace(CONTROLNET, conditions=conditions, predict=predict)
    stock, _ = check(family, pipe)
    assert far(stock, draw(given(family, adapter_conditioning_scale=0.0), pipe))
