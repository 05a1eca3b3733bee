"""A probe in every pipeline family's own call: parts as the plan that parts there would, or is refused in the first step."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionAdapterPipeline, T2IAdapter
from families import FAMILIES
from families.case import GROUPS, PICTURES, draw
from families.unet_parts import images, prompts, relative
from families.unets import STABLE_DIFFUSION, widened
from measures import far, worst
from tiny import randomise

import sage
from sage import Leaf, Probe, SharingPlan

pytestmark = pytest.mark.usefixtures("one_thread")
LEAVES = [Leaf(f"picture {number}") for number in PICTURES]
SEVERAL_CALLS = (  # in one step: guidance by calls of its own, a ControlNet
    "Stable Diffusion ControlNet",
    "SD3 skip-layer guidance",
    "Flux true CFG",
    "Chroma",
    "Qwen-Image",
    "Lumina 2",
    "CogView4",
    "Wan",
    "Wan 2.2",
    "HunyuanVideo",
)


def flat(share):
    return SharingPlan.flat(LEAVES, GROUPS, share, representatives=[group[0] for group in GROUPS])


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_probe_in_the_pipelines_own_call(family):
    pipe = family.build()
    if family.name not in SEVERAL_CALLS:
        check(family, pipe)
        return
    with sage.enable(pipe, flat(0.75), probe=Probe([0.5], 0.0)):
        with pytest.raises(ValueError, match="probe needs a loop with one denoiser call per step, guidance copies in one batch"):
            draw(family, pipe)


def check(family, pipe):
    """No tolerance is the plan that parts there, infinite tolerance the plan, and the rows are counted."""
    late, call = (family.calls - 1) / family.calls, family.calls // 2
    drawn, stats = {}, {}
    for name, share, probe in (
        ("late", late, None),
        ("there", call / family.calls, None),
        ("measured", late, Probe([call / family.calls], math.inf)),
        ("parted", late, Probe([call / family.calls], 0.0)),
    ):
        with sage.enable(pipe, flat(share), probe=probe) as sharing:
            drawn[name], stats[name] = draw(family, pipe), sharing.stats
    assert worst(drawn["measured"], drawn["late"]) <= 1e-5 and worst(drawn["parted"], drawn["there"]) <= 1e-5
    assert far(drawn["there"][1:2], drawn["late"][1:2]) and torch.isfinite(drawn["parted"]).all()
    rows = stats["there"]["rows"]
    assert stats["parted"]["rows"] == [*rows[:call], len(GROUPS) + len(PICTURES), *rows[call + 1 :]]
    assert stats["measured"]["nfe"] == stats["late"]["nfe"] + len(PICTURES)
    for made in (stats["measured"]["probes"], stats["parted"]["probes"]):
        assert [group["leaves"] for group in made[0]["groups"]] == GROUPS and len(made) == 1
        assert all(0 < group["deviation"] < 100 for group in made[0]["groups"])


def test_a_t2i_adapter_runs_before_the_loop():
    """Its features are the same for a group and its members."""
    adapter = randomise(T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=2), seed=7)
    blocks = dict(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    pipe = relative(StableDiffusionAdapterPipeline, unet=widened(**blocks), adapter=adapter)

    def conditions(pipe, pictures):
        return {**prompts(pipe, pictures), "image": images(pictures)}

    check(replace(STABLE_DIFFUSION, conditions=conditions), pipe)
