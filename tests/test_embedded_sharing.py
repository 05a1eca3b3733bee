"""The embedded model under sharing: unshared it equals stock; a loner in a shared call equals stock too."""

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from measures import worst

import sage
from sage import Leaf, SageScheduler, SharingPlan
from sage.emoji import load_pipeline

PROMPTS = ["red heart", "blue heart", "cat face", "pizza"]
LEAVES = [Leaf(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def pipe():
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe):
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    return pipe(PROMPTS, generator=generators, num_inference_steps=4, guidance_scale=2.5, output_type="latent").images


@pytest.mark.parametrize("solver", ["ddim", "euler-a", "dpm++2m", "dpm++2m-sde", "unipc"])
def test_unshared_equals_stock_and_so_does_a_loner(pipe, solver):
    stock = pipe.scheduler
    base = type(SageScheduler.from_config(stock.config, solver=solver)).__mro__[2]
    pipe.scheduler = base.from_config(SageScheduler.from_config(stock.config, solver=solver).config)
    try:
        expected = draw(pipe)
        with sage.enable(pipe, SharingPlan.independent(LEAVES)) as sharing:
            assert worst(draw(pipe), expected) <= 1e-5
        assert sharing.stats["solver_path"] == "table"
        with sage.enable(pipe, SharingPlan.flat(LEAVES, [(0, 1)], 0.5)):
            shared = draw(pipe)
        assert worst(shared[2:], expected[2:]) <= 1e-5
        assert (shared[:2] - expected[:2]).abs().max() > 1e-2
    finally:
        pipe.scheduler = stock
    assert type(stock) is DDIMScheduler


def test_unshared_own_step_is_bit_equal_to_stock(pipe):
    stock = pipe.scheduler
    pipe.scheduler = PNDMScheduler.from_config(stock.config, skip_prk_steps=True)
    try:
        expected = draw(pipe)
        with sage.enable(pipe, SharingPlan.independent(LEAVES)) as sharing:
            assert torch.equal(draw(pipe), expected)
        assert sharing.stats["solver_path"].startswith("own step: ")
    finally:
        pipe.scheduler = stock
