"""What else a call of Stable Diffusion can be given: guidance options, embeddings, several pictures per prompt, images."""

from dataclasses import replace

import pytest
import torch
from families.case import PICTURES, draw, shared_by_hand
from families.unet_parts import GUIDANCE, averages, doubled, guided, images, prompts, texts
from families.unets import CONTROLNET, IMG2IMG, INPAINT, PAG, STABLE_DIFFUSION
from measures import far, worst
from PIL import Image
from variant_checks import BRANCH, LEAVES, check, flat, given

import sage
from sage import SharingPlan

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pipe():
    return STABLE_DIFFUSION.build()


@pytest.fixture(scope="module")
def plain(pipe):
    """Latents of a stock call without options: the control of the tests below."""
    return draw(STABLE_DIFFUSION, pipe)


# ---- guidance


def test_guidance_rescale(pipe, plain):
    """By hand: the guided prediction with the conditional one's standard deviation, mixed seven to three."""

    def predict(pipe, x, t, condition, s):
        output = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=doubled(condition)).sample
        uncond, cond = output.chunk(2)
        mixed = uncond + GUIDANCE * (cond - uncond)
        return 0.7 * mixed * (cond.std() / mixed.std()) + 0.3 * mixed

    stock, _ = check(replace(given(STABLE_DIFFUSION, guidance_rescale=0.7), predict=predict), pipe)
    assert far(stock, plain)


def test_without_guidance(pipe, plain):
    """guidance_scale=1: one row per picture, and no negative prompt."""

    def predict(pipe, x, t, condition, s):
        return pipe.unet(x, t, encoder_hidden_states=condition["positive"]).sample

    stock, _ = check(replace(given(STABLE_DIFFUSION, guidance_scale=1.0), predict=predict), pipe, copies=1, max_rows=1)
    assert far(stock, plain)


@pytest.mark.parametrize("last", [0, 2], ids=["in the trunk", "after the branch"])
def test_a_callback_that_ends_guidance(pipe, plain, last):
    """From two rows per picture to one, before or after groups part. By hand: guidance up to call `last`, then none."""

    def end(pipe, step, timestep, tensors):
        if step != last:
            return {}
        pipe._guidance_scale = 1.0
        return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[1]}

    def predict(pipe, x, t, condition, s):
        if s <= last:
            return guided(pipe, x, t, condition, s)
        return pipe.unet(x, t, encoder_hidden_states=condition["positive"]).sample

    options = {"callback_on_step_end": end, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    stock, _ = check(replace(given(STABLE_DIFFUSION, **options), predict=predict), pipe)
    assert far(stock, plain)


def test_a_callback_that_ramps_guidance(pipe, plain):
    """By hand: another scale at every call."""

    def ramp(pipe, step, timestep, tensors):
        pipe._guidance_scale = GUIDANCE + step + 1
        return {}

    def predict(pipe, x, t, condition, s):
        return guided(pipe, x, t, condition, s, guidance=GUIDANCE + s)

    stock, _ = check(replace(given(STABLE_DIFFUSION, callback_on_step_end=ramp), predict=predict), pipe)
    assert far(stock, plain)


def test_perturbed_attention_with_few_rows():
    """Its attention takes the batch for three equal parts, also where `max_rows` is no multiple of three."""
    check(PAG, PAG.build(), copies=3, max_rows=4)


# ---- prompts


def test_negative_prompts_are_averaged(pipe):
    """Each picture has a negative prompt of its own. Control: a trunk under the representative's alone is another one."""
    _, shared = check(STABLE_DIFFUSION, pipe)
    first_ones = replace(STABLE_DIFFUSION, mean=averages("positive"))
    assert worst(shared, shared_by_hand(first_ones, pipe, branch=BRANCH)) > 1e-4


def test_no_negative_prompt(pipe, plain):
    """By hand: the empty text."""

    def row(pipe, kwargs, i):
        return dict(zip(("positive", "negative"), pipe.encode_prompt(kwargs["prompt"][i], "cpu", 1, True, "")))

    stock, _ = check(replace(given(STABLE_DIFFUSION, negative_prompt=None), row=row), pipe)
    assert far(stock, plain)


def embedded(pipe, pictures):
    """The conditions of Stable Diffusion as embeddings, scaled so that they are not those of any prompt."""
    kwargs = prompts(pipe, pictures)
    rows = [texts(pipe, kwargs, i) for i in range(len(pictures))]
    del kwargs["prompt"], kwargs["negative_prompt"]
    kwargs["prompt_embeds"] = torch.cat([row["positive"] for row in rows]) * 1.5
    return {**kwargs, "negative_prompt_embeds": torch.cat([row["negative"] for row in rows]) * 0.5}


def test_prompt_embeds(pipe, plain):
    def row(pipe, kwargs, i):
        return {"positive": kwargs["prompt_embeds"][i : i + 1], "negative": kwargs["negative_prompt_embeds"][i : i + 1]}

    stock, _ = check(replace(STABLE_DIFFUSION, conditions=embedded, row=row), pipe)
    assert far(stock, plain)


def test_several_images_per_prompt(pipe):
    """Three prompts, two pictures each, in a group of two prompts, one within a prompt, and a loner, which equals stock."""

    def conditions(pipe, pictures):
        return {**prompts(pipe, pictures[::2]), "num_images_per_prompt": 2}

    family = replace(STABLE_DIFFUSION, conditions=conditions, row=lambda pipe, kwargs, i: texts(pipe, kwargs, i // 2))
    pictures, seeds, groups = [0, 0, 1, 1, 2, 2], [100 + i for i in range(6)], [[0, 1, 4], [2, 3], [5]]
    stock, shared = check(family, pipe, pictures, seeds, groups)
    assert worst(shared[5], stock[5]) <= 1e-5


# ---- what a call returns


def test_decoded_pictures(pipe):
    """output_type="pt" gives the decoded latents of the loop by hand, in [0, 1]."""
    with sage.enable(pipe, flat()):
        got = draw(STABLE_DIFFUSION, pipe, output_type="pt")
    latents = shared_by_hand(STABLE_DIFFUSION, pipe, branch=BRANCH) / pipe.vae.config.scaling_factor
    with torch.no_grad():
        expected = (pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    assert got.shape == (len(PICTURES), 3, 16, 16) and expected.std() > 0.01
    assert worst(got, expected) <= 1e-5


# ---- changes of the model


def test_freeu(plain):
    """Fourier-filtered skip connections; by hand through the same U-Net. Control: they change the picture."""
    pipe = STABLE_DIFFUSION.build()
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    stock, _ = check(STABLE_DIFFUSION, pipe)
    assert far(stock, plain)


def test_lora_with_a_scale(plain):
    """By hand through the same U-Net, with the scale given to it. Control: scale 1 draws other pictures."""
    peft = pytest.importorskip("peft")
    pipe = STABLE_DIFFUSION.build()
    pipe.unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]), "style")
    for name, parameter in pipe.unet.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(parameter.numel()))
    scale = {"scale": 0.5}

    def predict(pipe, x, t, condition, s):
        return guided(pipe, x, t, condition, s, cross_attention_kwargs=scale)

    stock, _ = check(replace(given(STABLE_DIFFUSION, cross_attention_kwargs=scale), predict=predict), pipe)
    assert far(stock, plain) and far(stock, draw(STABLE_DIFFUSION, pipe))


# ---- images


@pytest.mark.parametrize(("family", "argument"), [(IMG2IMG, "image"), (INPAINT, "mask_image"), (CONTROLNET, "image")])
def test_images_that_differ_within_a_group_are_refused(family, argument):
    """One row cannot have two images. Control: pictures that go their own ways may."""
    pipe = family.build()
    kwargs = family.conditions(pipe, PICTURES)
    other = {argument: kwargs[argument].roll(1, dims=0)}  # rows 0 and 1 differ, so do their groups'
    with sage.enable(pipe, flat()), pytest.raises(ValueError, match=argument):
        draw(family, pipe, **other)
    expected = draw(family, pipe, **other)
    with sage.enable(pipe, SharingPlan.independent(LEAVES)):
        assert worst(draw(family, pipe, **other), expected) <= 1e-5


def test_pil_images():
    """A list of PIL images, equal within a group though not the same objects, draws what a tensor of the same pixels draws."""
    pipe = IMG2IMG.build()
    pixels = (images(PICTURES) * 255).round().to(torch.uint8)
    pil = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    with sage.enable(pipe, flat()):
        assert worst(draw(IMG2IMG, pipe, image=pil), draw(IMG2IMG, pipe, image=pixels / 255)) <= 1e-5
