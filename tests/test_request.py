"""Which pictures of a call begin from the same image: only those may be of one group."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image
from tiny import stable_diffusion

import sage
from sage import Leaf, SharingPlan
from sage.request import Request

PROMPTS = ["a red cat", "a blue cat", "a green cat", "a grey cat"]


def image(number: int) -> Image.Image:
    return Image.fromarray(np.full((16, 16, 3), 40 * number, dtype=np.uint8))


A, B, C, D = map(image, range(4))


class Named:
    """Stands for a pipeline: only what a request looks at."""

    def __init__(self, controlnets: int = 0):
        if controlnets:
            self.controlnet = type("Nets", (), {"nets": [None] * controlnets})()


class Flux2Pipeline(Named):
    pass


def kinds(pipe=None, prompts=2, images=1, **given) -> list[int]:
    """The number of the image, in the order of their first use, that each picture is taken to begin from."""
    asked = {"prompt": PROMPTS[:prompts], "num_images_per_prompt": images, **given}
    pictures = Request(pipe or Named(), asked).pictures or [()] * (prompts * images)
    return [list(dict.fromkeys(pictures)).index(picture) for picture in pictures]


@pytest.mark.parametrize(
    "given, expected",
    [
        (dict(image=A), [0, 0]),
        (dict(image=[A]), [0, 0]),
        (dict(image=[A, A]), [0, 0]),
        (dict(image=[A, B]), [0, 1]),
        (dict(image=torch.zeros(3, 8, 8)), [0, 0]),
        (dict(image=torch.zeros(2, 3, 8, 8)), [0, 0]),
        (dict(image=torch.arange(2.0).view(2, 1, 1, 1).expand(2, 3, 8, 8)), [0, 1]),
        (dict(image=np.arange(2.0).reshape(2, 1, 1, 1).repeat(3, 3)), [0, 1]),
        (dict(image=[A, A], mask_image=[A, B]), [0, 1]),
        (dict(image=[A, B], images=2), [0, 1, 2, 3]),  # A B A B or A A B B: nobody is sure to share
        (dict(image=[A, A, B, B], images=2), [0, 0, 1, 1]),
        (dict(image=[A, B], prompts=4), [0, 1, 2, 3]),
        (dict(image=[A, B, C], prompts=4), [0, 1, 2, 3]),  # no layout at all
        (dict(video=[A, B, C]), [0, 0]),  # frames of one video
        (dict(video=[[A, B], [A, C]]), [0, 1]),
        (dict(video=torch.arange(2.0).view(2, 1, 1, 1, 1).expand(2, 4, 3, 8, 8)), [0, 1]),
        (dict(video=[torch.zeros(4, 3, 8, 8), torch.ones(4, 3, 8, 8)]), [0, 1]),
    ],
)
def test_images_are_told_apart(given, expected):
    assert kinds(**given) == expected


def test_lists_that_are_not_of_pictures():
    """An image for each ControlNet, or several references for all pictures."""
    assert kinds(Named(controlnets=2), image=[A, B]) == [0, 0]
    assert kinds(Named(controlnets=2), image=[A, B], control_image=[C, D]) == [0, 1]
    assert kinds(Named(controlnets=2), image=[A, A], control_image=[C, D]) == [0, 0]
    assert kinds(Flux2Pipeline(), image=[A, B]) == [0, 0]


@pytest.mark.parametrize("images, given", [(1, [A, B, A, B]), (2, [A, B, A, B]), (2, [A, B]), (1, [A, B])])
def test_a_loner_is_stocks_whatever_the_layout(images, given, monkeypatch):
    """Pictures that nobody shares with come out as without sharing, in every layout of images that the pipeline takes."""
    pipe = StableDiffusionImg2ImgPipeline(**stable_diffusion().components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    prompts = PROMPTS[: 4 // images]
    seeds = range(len(prompts) * images)

    def draw():
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        options = dict(num_images_per_prompt=images, strength=0.6, num_inference_steps=5, output_type="latent")
        return pipe(prompts, image=given, generator=generators, **options).images

    expected = draw()
    alike = sage.embed_prompts(["a cat"] * len(prompts))
    monkeypatch.setattr("sage.sharing.embed_prompts", lambda *args, **kwargs: alike)
    with sage.enable(pipe, share=0.5, max_group_size=8) as sharing:
        got = draw()
    together = [leaf for root in sharing.plan.roots if len(root.members) > 1 for leaf in root.members]
    for leaf in set(seeds) - set(together):
        assert (got[leaf] - expected[leaf]).abs().max() < 1e-4
    assert bool(together) == (len(given) == 4)  # A with A, B with B


def test_a_plan_over_different_images_is_refused():
    plan = SharingPlan.flat([Leaf(prompt) for prompt in PROMPTS[:2]], [[0, 1]], 0.5)
    with pytest.raises(ValueError, match="image differs between pictures 0 and 1, which the plan puts into one group"):
        Request(Named(), {"prompt": PROMPTS[:2], "image": [A, B]}).check(plan)
    Request(Named(), {"prompt": PROMPTS[:2], "image": [A, A.copy()]}).check(plan)
