"""What a probe is refused with, and by; and the plans that it refines."""

import math

import native_cases
import numpy as np
import pytest
import torch
from hand_branch import Setting
from native_cases import CASES, Rows
from test_probe import APART, FLAT, OWN, TREE
from tiny import PROMPTS, stable_diffusion

import sage
from sage import Probe
from sage.probe import Probed

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pipe():
    return stable_diffusion()


# ---- refusals


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(calls=()), ValueError, r"Probe: calls must be at least one fraction below 1 of the denoiser calls, got \(\)"),
        (dict(calls=[0.2, 1.0]), ValueError, "Probe: calls must be at least one fraction below 1"),
        (dict(calls=[0.2, -0.1]), ValueError, r"Probe: calls\[1\] must be in \[0, 1\], got -0.1"),
        (dict(calls=0.2), TypeError, "Probe: calls must be a sequence, got float"),
        (dict(calls=["early"]), TypeError, r"Probe: calls\[0\] must be a number in \[0, 1\], got 'early'"),
        (dict(tolerance=-0.5), ValueError, "Probe: tolerance must be at least 0, got -0.5"),
        (dict(tolerance=math.nan), ValueError, "Probe: tolerance must be at least 0, got nan"),
        (dict(tolerance="tight"), TypeError, "Probe: tolerance must be a number of at least 0, got 'tight'"),
        (dict(tolerance=True), TypeError, "Probe: tolerance must be a number of at least 0, got True"),
    ],
)
def test_bad_probes_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        Probe(**options)


def test_a_probe_is_plain_data():
    probe = Probe(np.array([0.3, 0.1]), np.float32(0.5))
    assert probe == Probe((0.1, 0.3), 0.5) and type(probe.tolerance) is float and hash(probe) == hash(Probe([0.1, 0.3], 0.5))


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(probe=0.3), TypeError, "probe must be a sage.Probe or None, got float"),
        (dict(branch_noise=0.5, seeds=OWN), ValueError, "probe and branch_noise exclude each other: its noise belongs to the step before"),
        (dict(branch_back=1, seeds=OWN), ValueError, "probe and branch_back exclude each other"),
        (dict(on_part=print), ValueError, r"probe and on_part \(keep_trunks\) exclude each other"),
        (dict(graphs=True), ValueError, "probe and graphs exclude each other: how many rows .* pass graphs=False"),
    ],
)
def test_what_does_not_go_with_a_probe_is_refused_before_the_denoiser_runs(pipe, options, error, message):
    setting = Setting(pipe, "ddim")
    with pytest.raises(error, match=message):
        setting.sample(FLAT, **{"probe": Probe()} | options)
    assert setting.rows == []


def test_pipelines_refuse_the_same(pipe):
    with pytest.raises(ValueError, match="probe and branch_noise exclude each other"):
        sage.enable(pipe, FLAT, probe=Probe(), branch_noise=0.5)
    with pytest.raises(TypeError, match="probe must be a sage.Probe or None, got dict"):
        sage.enable(pipe, FLAT, probe={})
    for other in (dict(branch_noise=0.5), dict(branch_back=1), dict(keep_trunks=True)):
        with Rows(pipe) as seen, pytest.raises(ValueError, match=f"probe and .*{next(iter(other))}.* exclude each other"):
            sage.generate(pipe, PROMPTS, probe=Probe(), **other)
        assert seen == []
    with pytest.raises(ValueError, match="probe and graphs exclude each other"):
        native_cases.native(pipe, native_cases.flat(), native_cases.GUIDED, probe=Probe(), graphs=True)


@pytest.mark.parametrize("name", APART)
def test_the_hook_refuses_guidance_by_two_calls_in_the_first_step(name):
    case = next(case for case in CASES if case.name == name)
    pipe = case.build()
    with Rows(pipe) as seen, pytest.raises(ValueError, match=r"one denoiser call per step, .* got transformer\w* and transformer"):
        native_cases.hooked(pipe, native_cases.flat(0.75), case.kwargs, probe=Probe([0.5]))
    assert len(seen) == 1
    unshared = native_cases.hooked(pipe, native_cases.apart(), case.kwargs, probe=Probe([0.5]))
    assert unshared[1]["probes"] == []


def test_the_hook_refuses_caches():
    from diffusers import FirstBlockCacheConfig

    pipe = native_cases.flux()
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    kwargs = {"num_inference_steps": 4, **native_cases.SMALL}
    with Rows(pipe) as seen, pytest.raises(ValueError, match="probe needs a denoiser without a cache, got transformer of FluxPipeline"):
        native_cases.hooked(pipe, native_cases.flat(0.75), kwargs, probe=Probe([0.5]))
    assert seen == []


# ---- resolved plans


def test_a_resolved_plan_is_refined():
    plan = TREE.resolve(10)
    assert plan.children(2, 0) == (((0, 2), 0), ((4,), 4)) and plan.children(8, 0) == (((0,), 0), ((2,), 2))
    assert plan.children(8, 2) == () and plan.children(9, 0) == ()
    early = plan.parted_before(2, [0])
    assert early.members[:2] == plan.members[:2] and early.members[7:] == plan.members[7:]
    assert early.members[2] == early.members[6] == ((0, 2), (1, 3), (4,)) and early.node_representatives[2] == (0, 3, 4)
    assert early.members[3] is early.members[2] and early.nfe == plan.nfe + 5
    assert plan.parted_before(2, []).members == plan.members
    both = plan.parted_before(2, [0, 1])
    assert both.members[2] == ((0, 2), (1,), (3,), (4,)) and both.branch_call(1) == 2 and both.branch_call(0) == 9


@pytest.mark.parametrize(
    "call, nodes, message",
    [
        (10, [0], r"call must be in \[0, 10\), got 10"),
        (2, [2], r"node must be in \[0, 2\), the rows of call 2, got 2"),
        (9, [0], r"nodes must part later, but leaves \[0\] of call 9 stay together to the last"),
    ],
)
def test_what_cannot_part_is_refused(call, nodes, message):
    with pytest.raises(ValueError, match=message):
        TREE.resolve(10).parted_before(call, nodes)


def test_probed_rows_reduce_nodes_and_children():
    probed = Probed(TREE.resolve(10), 2)
    x = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])[:, None]
    assert probed.mean(x, 1).flatten().tolist() == [7.0, 5.0, 2.5, 16.0, 2.0, 8.0]
    assert probed.representative(x, 1).flatten().tolist() == [16.0, 8.0, 1.0, 16.0, 2.0, 8.0]
    assert probed.node.tolist() == [0, 1, 0, 0, 1, 1] and not probed.trivial
    assert probed.expand(torch.arange(6.0), 1).tolist() == [0, 1, 0, 1, 0]
    assert probed.going_on.tolist() == [0, 1]
