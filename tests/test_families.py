"""Every pipeline family, through its own `__call__`: the columns of the support matrix."""

import copy

import pytest
import torch
from families import FAMILIES
from families.case import GROUPS, PICTURES, draw, shared_by_hand
from measures import worst
from torch._dynamo.testing import CompileCounter

import sage
from sage import Leaf, SharingPlan

LEAVES = [Leaf(f"picture {number}") for number in PICTURES]
BRANCH = 2
COMPILED = ("Stable Diffusion", "Stable Diffusion XL", "Stable Diffusion 3", "Flux", "PixArt-sigma", "Z-Image", "Wan 2.2")


def flat(share):
    return SharingPlan.flat(LEAVES, GROUPS, share, representatives=[group[0] for group in GROUPS])


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(family):
    torch.set_num_threads(1)
    return family.build()


@pytest.fixture(scope="module")
def stock(family, pipe):
    """What the pipeline draws without sharing; also: its numbers stay finite and of order one."""
    latents = draw(family, pipe)
    assert torch.isfinite(latents).all() and 0.05 < latents.abs().max() < 100
    return latents


def test_conditioning_matters(family, pipe, stock):
    """Without this the comparisons below would compare noise."""
    other = draw(family, pipe, pictures=[number + 10 for number in PICTURES])
    assert min((a - b).abs().max().item() for a, b in zip(other, stock)) > 1e-2


@pytest.mark.support("equals a loop written by hand")
def test_sharing_equals_the_loop_written_by_hand(family, pipe, stock):
    expected = shared_by_hand(family, pipe, branch=BRANCH)
    with sage.enable(pipe, flat(BRANCH / family.calls)):
        got = draw(family, pipe)
    assert worst(got, expected) <= 1e-5
    assert (got[1] - stock[1]).abs().max() > 1e-3, "sharing must change a member's picture"
    assert worst(shared_by_hand(family, pipe, branch=0), stock) <= 1e-5


@pytest.mark.support("rows = plan")
def test_rows_equal_the_plans(family, pipe, stock):
    plan = flat(BRANCH / family.calls)
    with sage.enable(pipe, plan) as sharing:
        draw(family, pipe)
    assert sharing.stats["rows"] == [len(GROUPS)] * BRANCH + [len(PICTURES)] * (family.calls - BRANCH)
    assert sharing.stats["nfe"] == plan.cost(family.calls).nfe


@pytest.mark.support("unshared = stock")
def test_unshared_equals_stock(family, pipe, stock):
    with sage.enable(pipe, SharingPlan.independent(LEAVES)) as sharing:
        got = draw(family, pipe)
    assert worst(got, stock) <= 1e-5
    assert sharing.stats["solver_path"] == "table" or torch.equal(got, stock)


@pytest.mark.support("disable restores")
def test_disable_restores(family, pipe, stock):
    cls, scheduler, attributes = type(pipe), type(pipe.scheduler), set(pipe.__dict__)
    with sage.enable(pipe, flat(0.5)):
        draw(family, pipe)
    assert type(pipe) is cls and type(pipe.scheduler) is scheduler and set(pipe.__dict__) == attributes
    assert torch.equal(draw(family, pipe), stock)


def denoisers(pipe):
    return [name for name in ("unet", "transformer", "transformer_2", "controlnet") if getattr(pipe, name, None) is not None]


@pytest.mark.support("offload")
def test_offloaded_weights(family, pipe, stock):
    """accelerate moves the denoiser's weights to and from the meta device around every layer, inside the interception."""
    accelerate = pytest.importorskip("accelerate")
    with sage.enable(pipe, flat(BRANCH / family.calls)):
        expected = draw(family, pipe)
    other = copy.deepcopy(pipe)
    for name in denoisers(other):
        accelerate.cpu_offload(getattr(other, name), torch.device("cpu"))
    try:
        draw(family, other)
    except RuntimeError as error:
        pytest.skip(f"not tested: the stock pipeline fails too ({type(error).__name__})")
    with sage.enable(other, flat(BRANCH / family.calls)) as sharing:
        assert worst(draw(family, other), expected) <= 1e-5
    assert sharing.stats["rows"] == [len(GROUPS)] * BRANCH + [len(PICTURES)] * (family.calls - BRANCH)


@pytest.mark.deep
@pytest.mark.support("compile")
def test_compiled(family, pipe, stock, request):
    """torch.compile of every denoiser: the same latents, and no new graph when the same plan runs again."""
    if family.name not in COMPILED and not request.config.getoption("--support"):
        pytest.skip("takes long: compiled when the support matrix is made")
    plan = flat(BRANCH / family.calls)
    with sage.enable(pipe, plan):
        expected = draw(family, pipe)
    other, counter = copy.deepcopy(pipe), CompileCounter()
    torch._dynamo.reset()
    for name in denoisers(other):
        setattr(other, name, torch.compile(getattr(other, name), backend=counter))
    with sage.enable(other, plan):
        assert worst(draw(family, other), expected) <= 1e-5
        graphs = counter.frame_count
        assert graphs > 0
        draw(family, other)
    assert counter.frame_count == graphs
