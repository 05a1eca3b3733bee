"""Variants of Stable Diffusion XL and of Kandinsky 2.2."""

from dataclasses import replace

import pytest
import torch
from families.case import GROUPS, PICTURES, SEEDS, draw, shared_by_hand
from families.unet_parts import GUIDANCE
from families.unet_xl import EMBEDS, REFINER, SDXL, kandinsky_combined, xl_row
from measures import far, worst
from variant_checks import BRANCH, CALLS, LEAVES, check, flat, given

import sage
from sage import SharingPlan

pytestmark = pytest.mark.usefixtures("one_thread")


def test_xl_clip_skip():
    """By hand: the text encoders' last layer but two. Control: it changes the picture."""

    def row(pipe, kwargs, i):
        options = {"device": "cpu", "negative_prompt": kwargs["negative_prompt"][i], "clip_skip": 1}
        return {**xl_row(pipe, kwargs, i), **dict(zip(EMBEDS, pipe.encode_prompt(kwargs["prompt"][i], **options)))}

    pipe = SDXL.build()
    stock, _ = check(replace(given(SDXL, clip_skip=1), row=row), pipe)
    assert far(stock, draw(SDXL, pipe))


def test_xl_negative_sizes():
    """Time ids that are not alike in all rows: in a batch, the pipeline alternates between the negative and the positive ones.

    A trunk has its representative's. Control: the sizes change the picture.
    """

    def row(pipe, kwargs, i):
        ids, rows = [[64, 32, 0, 0, 8, 8], [16, 16, 0, 0, 16, 16]], [i, len(kwargs["prompt"]) + i]
        return {**xl_row(pipe, kwargs, i), "time_ids": torch.tensor([ids[row % 2] for row in rows], dtype=torch.float32)}

    pipe = SDXL.build()
    options = {"negative_original_size": (64, 32), "negative_target_size": (8, 8)}
    stock, _ = check(replace(given(SDXL, **options), row=row), pipe)
    assert far(stock, draw(SDXL, pipe))


def test_xl_base_then_refiner():
    """The base stops half way, after two of four calls, groups having parted after the first; the refiner goes on from there.

    A share is a fraction of the schedule, not of the calls before `denoising_end`. The base's latents are those of the loop
    by hand, cut short. The refiner, whose images now differ within a group, does not share: it equals stock.
    """
    base, refiner, end = SDXL.build(), REFINER.build(), 0.5
    family = replace(given(SDXL, denoising_end=end), calls=2)
    with sage.enable(base, flat(share=1 / CALLS)) as sharing:
        latents = draw(family, base)
    assert sharing.stats["rows"] == [len(GROUPS), len(PICTURES)]
    assert worst(latents, shared_by_hand(family, base, branch=1)) <= 1e-5
    onward = given(REFINER, image=latents, denoising_start=end, num_inference_steps=CALLS)
    expected = draw(onward, refiner)
    assert far(expected, latents)
    with sage.enable(refiner, SharingPlan.independent(LEAVES)) as sharing:
        assert worst(draw(onward, refiner), expected) <= 1e-5
    assert sharing.stats["rows"] == [len(PICTURES)] * 2


def test_kandinsky_combined():
    """Prior and decoder in one call: the prior does not share, the decoder shares as it does alone.

    Compared with two calls: the prior's own, then the decoder's with `sage.enable`, with the same generators.
    """
    pipe = kandinsky_combined()
    prompt = [leaf.prompt for leaf in LEAVES]
    prior = {"num_inference_steps": 2, "guidance_scale": GUIDANCE}
    decoder = {"num_inference_steps": CALLS, "guidance_scale": GUIDANCE, "height": 16, "width": 16, "output_type": "latent"}
    both = {**decoder, **{f"prior_{name}": value for name, value in prior.items()}}

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in SEEDS]

    own = generators()
    embeds = pipe.prior_pipe(prompt, generator=own, output_type="pt", return_dict=False, **prior)
    with sage.enable(pipe.decoder_pipe, flat()):
        expected = pipe.decoder_pipe(*embeds, generator=own, **decoder).images
    with sage.enable(pipe, flat()) as sharing:
        got = pipe(prompt, generator=generators(), **both).images
    assert sharing.stats["rows"] == [len(GROUPS)] * BRANCH + [len(PICTURES)] * (CALLS - BRANCH)
    assert worst(got, expected) <= 1e-5
    assert far(got[1:], pipe(prompt, generator=generators(), **both).images[1:])
