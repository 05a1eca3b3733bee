"""A SageScheduler behaves as the class that it replaces, apart from how `step` computes: every public behaviour, side by side.

Each test compares with diffusers' own class, or with a property that is known without it, and most have a control that shows
that the comparison can fail.
"""

import copy
import functools
import inspect
import json
import pickle

import numpy as np
import pytest
import torch
from diffusers import schedulers

from sage import SageScheduler
from sage.scheduler import sage_class
from sage.solvers import coverage

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # diffusers under numpy 2
SHAPE = (2, 3, 6, 5)
TABLE = [name for name, how in coverage().items() if how.table]
NOISE_SCHEDULE = [n for n in TABLE if "beta_start" in inspect.signature(getattr(schedulers, n)).parameters]
COUNTING = [n for n in TABLE if hasattr(getattr(schedulers, n), "set_begin_index")]
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# no clipping, no warning about uneven numbers of steps, and no noise level at which diffusers' float32 loses digits
PLAIN = {"clip_sample": False, "lower_order_final": True, "sigma_max": 20.0}


def make(name, **config):
    """(diffusers' scheduler, ours), both of class `name`."""
    return copy.deepcopy(_made(name, tuple(config.items())))


@functools.lru_cache(maxsize=None)
def _made(name, config):  # KDPM2 takes its time
    cls = getattr(schedulers, name)
    known = inspect.signature(cls).parameters
    config = {k: v for k, v in {**STABLE_DIFFUSION, **PLAIN}.items() if k in known} | dict(config)
    return cls(**config), sage_class(cls)(**config)


def gaussian(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def steps_of(scheduler, steps=8, **options):
    count = {"num_inference_steps": 2 if isinstance(scheduler, schedulers.SCMScheduler) else steps}
    scheduler.set_timesteps(**({} if options.keys() & {"timesteps", "sigmas"} else count), **options)
    return scheduler.timesteps[:-1] if isinstance(scheduler, schedulers.SCMScheduler) else scheduler.timesteps


def network(x, t):
    return torch.tanh(x) * 0.7 + 0.1 * torch.sin(3 * x + float(t) / 100)


def loop(scheduler, timesteps, x, model=network, **kwargs):
    """The samples after every step."""
    if "generator" in inspect.signature(scheduler.step).parameters:
        kwargs["generator"] = torch.Generator().manual_seed(3)
    seen = []
    for t in timesteps:
        seen_by_model = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(model(seen_by_model, t), t, x, **kwargs).prev_sample
        seen.append(x)
    return torch.stack(seen)


def run(scheduler, steps=8, **options):
    timesteps = steps_of(scheduler, steps, **options)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # the first timestep may be there twice (beta sigmas), and diffusers then takes the second
    return loop(scheduler, timesteps, gaussian(1) * float(getattr(scheduler, "init_noise_sigma", 1.0)))


def close(ours, theirs, bound=2e-5):
    assert ours.shape == theirs.shape and theirs.isfinite().all()
    assert (ours - theirs).abs().max() <= bound * theirs.abs().max()


def same_schedule(first, second):
    assert torch.equal(first.timesteps, second.timesteps)
    assert not hasattr(first, "sigmas") or torch.equal(first.sigmas, second.sigmas)


# ---- configs and files


@pytest.mark.parametrize("name", TABLE)
def test_config_and_its_round_trips(name, tmp_path):
    stock, ours = make(name)
    assert dict(ours.config) == dict(stock.config) and ours.to_json_string() == stock.to_json_string()
    assert [c.__name__ for c in ours.compatibles] == [c.__name__ for c in stock.compatibles]
    ours.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    files = [json.loads((tmp_path / side / "scheduler_config.json").read_text()) for side in ("ours", "stock")]
    assert files[0] == files[1] and files[0]["_class_name"] == name
    plain, again = type(stock).from_pretrained(tmp_path / "ours"), SageScheduler.from_pretrained(tmp_path / "ours")
    assert type(plain) is type(stock) and isinstance(again, SageScheduler) and isinstance(again, type(stock))
    close(run(again), run(plain))


def test_options_that_a_class_does_not_have_survive_on_the_way_through_it():
    """As pipelines are given other schedulers: what Euler has no use for is there again in the DDIM of the way back."""
    start = {**STABLE_DIFFUSION, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "v_prediction"}
    stock = first = schedulers.DDIMScheduler(**start)
    ours = SageScheduler.from_config(first.config, solver="ddim")
    for name in ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DDIMScheduler"):
        stock = getattr(schedulers, name).from_config(stock.config)
        ours = SageScheduler.from_config({**ours.config, "_class_name": name})
        assert isinstance(ours, type(stock))
        assert {k: v for k, v in ours.config.items() if k[0] != "_"} == {k: v for k, v in stock.config.items() if k[0] != "_"}
    assert all(ours.config[key] == value for key, value in start.items())
    close(run(ours), run(first))
    other = SageScheduler.from_config(ours.config, solver="ddim", set_alpha_to_one=True)  # control
    assert not torch.equal(run(other)[-1], run(ours)[-1])


def test_unknown_options_are_kept_and_do_nothing():
    config = {**schedulers.DDIMScheduler(**STABLE_DIFFUSION, clip_sample=False).config, "of_another_class": 7}
    ours = SageScheduler.from_config(config, solver="ddim")
    assert ours.config["of_another_class"] == 7
    close(run(ours), run(make("DDIMScheduler")[0]))


# ---- schedules


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("steps", [1, 2, 5, 25])
def test_any_number_of_steps(name, steps):
    if name == "SCMScheduler" and steps != 2:
        pytest.skip("its default schedule has two steps")
    stock, ours = make(name)
    expected, got = run(stock, steps), run(ours, steps)
    same_schedule(ours, stock)
    assert ours._sage_trajectory.table is not None
    close(got, expected)


def test_timestep_spacings_are_the_known_ones():
    known = {"leading": list(range(900, -1, -100)), "trailing": list(range(999, 0, -100)), "linspace": list(range(999, -1, -111))}
    for spacing, expected in known.items():
        ours = SageScheduler.from_config({"timestep_spacing": spacing}, solver="ddim")
        assert steps_of(ours, 10).tolist() == expected
    offset = SageScheduler.from_config({"timestep_spacing": "leading", "steps_offset": 1}, solver="ddim")
    assert steps_of(offset, 10).tolist() == list(range(901, 0, -100))


@pytest.mark.parametrize("name", [n for n in NOISE_SCHEDULE if "timestep_spacing" in inspect.signature(getattr(schedulers, n)).parameters])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timestep_spacings(name, spacing):
    stock, ours = make(name, timestep_spacing=spacing)
    close(run(ours), run(stock))
    same_schedule(ours, stock)


TIMESTEPS = [n for n in TABLE if "timesteps" in inspect.signature(getattr(schedulers, n).set_timesteps).parameters]
SIGMAS = ["EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler", "LTXEulerAncestralRFScheduler"]


@pytest.mark.parametrize("name", [n for n in TIMESTEPS if n not in ("SCMScheduler", "LTXEulerAncestralRFScheduler")])
def test_timesteps_of_the_callers(name):
    stock, ours = make(name)
    given = [999, 759, 519, 259, 19] if name in ("LCMScheduler", "TCDScheduler") else [987, 750, 500, 230, 7]
    close(run(ours, timesteps=given), run(stock, timesteps=given))
    same_schedule(ours, stock)
    if not name.startswith(("FlowMatch", "Heun")):
        assert [round(t) for t in ours.timesteps.tolist()] == given
    with pytest.raises((ValueError, TypeError)):
        ours.set_timesteps(num_inference_steps=7, timesteps=given)
    assert ours.num_inference_steps == stock.num_inference_steps


@pytest.mark.parametrize("name", SIGMAS)
def test_sigmas_of_the_callers(name):
    stock, ours = make(name)
    given = [0.95, 0.7, 0.4, 0.05, 0.0] if name != "EulerDiscreteScheduler" else [13.0, 6.0, 2.0, 0.4, 0.0]
    given = given[:-1] if name.startswith("FlowMatch") else given
    close(run(ours, sigmas=given), run(stock, sigmas=given))
    same_schedule(ours, stock)
    assert ours.sigmas.tolist()[: len(given)] == pytest.approx(given)


SPACED = [n for n in TABLE if "use_karras_sigmas" in inspect.signature(getattr(schedulers, n)).parameters]


@pytest.mark.parametrize("name", SPACED)
@pytest.mark.parametrize("kind", ["karras", "exponential", "beta"])
def test_spaced_sigmas(name, kind):
    stock, ours = make(name, **{f"use_{kind}_sigmas": True})
    close(run(ours, 9), run(stock, 9))
    same_schedule(ours, stock)
    levels = np.unique(ours.sigmas.double().numpy())[::-1]
    levels = levels[levels > 0]
    assert (np.diff(levels) < 0).all() and len(levels) in (9, 10)
    spaced = {"karras": levels ** (1 / 7), "exponential": np.log(levels)}.get(kind)
    if spaced is not None:
        np.testing.assert_allclose(np.diff(spaced[:9]), np.diff(spaced[:9]).mean(), rtol=1e-3)
    plain = make(name)[1]  # control: without the option the noise levels are others
    plain.set_timesteps(9)
    assert not torch.equal(plain.sigmas, ours.sigmas)


def test_zero_terminal_snr():
    for name in ("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "TCDScheduler"):
        options = dict(rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction")
        stock, ours = make(name, **options)
        assert 1 - ours.alphas_cumprod[-1] > 1 - 1e-6 and steps_of(ours)[0] == 999
        close(run(ours), run(stock), 1e-4)  # a noise level of 4096, in float32
        assert ours._sage_trajectory.table is not None
    blind = make("DDIMScheduler", rescale_betas_zero_snr=True, timestep_spacing="trailing")[1]
    steps_of(blind)
    blind.step(gaussian(1), blind.timesteps[0], gaussian(2))
    assert "zero terminal SNR" in blind._sage_trajectory.reason  # the noise says nothing about x0 there


# ---- noise


@pytest.mark.parametrize("name", [n for n in TABLE if hasattr(getattr(schedulers, n), "add_noise")])
def test_add_noise(name):
    stock, ours = make(name)
    for scheduler in (stock, ours):
        steps_of(scheduler)
    t = ours.timesteps[[1, 3]]
    x0, noise = gaussian(4), gaussian(5)
    got = ours.add_noise(x0, noise, t)
    assert torch.equal(got, stock.add_noise(x0, noise, t))
    if hasattr(ours, "alphas_cumprod") and not hasattr(ours, "sigmas"):
        A = ours.alphas_cumprod[t.long()].float().view(-1, 1, 1, 1)
        torch.testing.assert_close(got, A.sqrt() * x0 + (1 - A).sqrt() * noise)
    assert not torch.allclose(got, ours.add_noise(x0, noise, t.flip(0)))


@pytest.mark.parametrize("name", [n for n in TABLE if hasattr(getattr(schedulers, n), "scale_noise")])
def test_scale_noise(name):
    stock, ours = make(name)
    for scheduler in (stock, ours):
        steps_of(scheduler)
    t, sigma = ours.timesteps[2:3], ours.sigmas[[list(ours.timesteps).index(ours.timesteps[2])]].view(-1, 1, 1, 1)
    got = ours.scale_noise(gaussian(4), t, gaussian(5))
    assert torch.equal(got, stock.scale_noise(gaussian(4), t, gaussian(5)))
    torch.testing.assert_close(got, sigma * gaussian(5) + (1 - sigma) * gaussian(4))


@pytest.mark.parametrize("name", [n for n in TABLE if hasattr(getattr(schedulers, n), "get_velocity")])
def test_get_velocity(name):
    stock, ours = make(name)
    t = ours.timesteps[[3, 700]]
    got = ours.get_velocity(gaussian(4), gaussian(5), t)
    assert torch.equal(got, stock.get_velocity(gaussian(4), gaussian(5), t))
    if hasattr(ours, "alphas_cumprod") and not hasattr(ours, "sigmas"):
        A = ours.alphas_cumprod[t.long()].float().view(-1, 1, 1, 1)
        torch.testing.assert_close(got, A.sqrt() * gaussian(5) - (1 - A).sqrt() * gaussian(4))


# ---- steps


@pytest.mark.parametrize("name", TABLE)
def test_before_set_timesteps_the_classs_own_step_answers(name):
    outcomes = []
    for scheduler in make(name):
        scheduler.is_scale_input_called = True
        torch.manual_seed(0)
        t = None if scheduler.timesteps is None else scheduler.timesteps[5]
        try:
            outcomes.append(scheduler.step(gaussian(1), t, gaussian(2)).prev_sample)
        except Exception as error:
            outcomes.append((type(error), str(error)))
    assert type(outcomes[0]) is type(outcomes[1])
    if torch.is_tensor(outcomes[0]):
        close(outcomes[1], outcomes[0])
    else:
        assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("name", TABLE)
def test_outputs_have_the_classs_form_and_the_samples_shape(name):
    results = []
    for scheduler in make(name):
        t, x, y = steps_of(scheduler)[0], gaussian(1, (1, 7, 3, 2)), gaussian(2, (1, 7, 3, 2))
        scheduler.is_scale_input_called = True
        results.append((scheduler.step(y, t, x), copy.copy(scheduler)))
        steps_of(scheduler)
        results[-1] += (scheduler.step(y, t, x, return_dict=False),)
    (theirs, _, their_tuple), (ours, _, our_tuple) = results
    assert type(ours) is type(theirs) and ours.keys() == theirs.keys()
    assert type(our_tuple) is tuple and len(our_tuple) == len(their_tuple) == len(ours)
    assert all(value.shape == (1, 7, 3, 2) for value in our_tuple)


@pytest.mark.parametrize("name", COUNTING)
def test_begin_index_and_step_index(name):
    stock, ours = make(name)
    for begin in (0, 2):
        for scheduler in (stock, ours):
            steps_of(scheduler)
            assert scheduler.step_index is None and scheduler.begin_index is None
            scheduler.set_begin_index(begin)
        x = gaussian(1)
        for t in steps_of_rest(ours, begin):
            for scheduler in (stock, ours):
                scheduler.is_scale_input_called = True
                scheduler.step(network(x, t), t, x)
            assert ours.step_index == stock.step_index and ours.begin_index == stock.begin_index == begin


def steps_of_rest(scheduler, begin):
    last = -1 if isinstance(scheduler, schedulers.SCMScheduler) else None
    return scheduler.timesteps[begin:last]


@pytest.mark.parametrize("name", TABLE)
def test_image_to_image_starts(name):
    """Noise an x0 to a later level and go on from there, with the begin index set and, where it can be, found by the timestep."""
    got, begin = [], 1 if name == "SCMScheduler" else 4
    for scheduler in make(name):
        timesteps = steps_of(scheduler)[begin:]
        start = gaussian(4) * 0.5 + gaussian(5)
        if hasattr(scheduler, "add_noise"):
            start = scheduler.add_noise(gaussian(4), gaussian(5), timesteps[:1])
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        got.append(loop(scheduler, timesteps, start))
        assert len(got[-1]) == len(timesteps) > 0
    close(got[1], got[0])
    whole = run(make(name)[1])  # control: the whole schedule ends elsewhere
    assert not torch.allclose(whole[-1], got[1][-1], atol=1e-3)


DISTILLED_OR_NOISY = ("LCMScheduler", "TCDScheduler", "DDPMParallelScheduler", "DDPMScheduler", "DEISMultistepScheduler")
EXACT = [n for n in NOISE_SCHEDULE if n not in DISTILLED_OR_NOISY]


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_model_that_knows_the_picture_gets_it_back(name, prediction_type):
    """Not from diffusers: noise an x0, predict exactly, and every solver must end at x0."""
    options = {} if name.startswith(("UniPC", "LMS", "Heun")) else {"timestep_spacing": "trailing"}
    options = {k: v for k, v in options.items() if k in inspect.signature(getattr(schedulers, name)).parameters}
    ours, (x0, noise) = make(name, prediction_type=prediction_type, **options)[1], (gaussian(4), gaussian(5))
    timesteps = steps_of(ours, 12)
    start = ours.add_noise(x0, noise, timesteps[:1])

    def oracle(seen, t):
        """`seen` is alpha*x0 + sigma*noise' in the variance-preserving scale, whatever the class's own scale."""
        alpha = levels[len(calls)]
        calls.append(t)
        sigma = (1 - alpha**2).sqrt()
        eps = (seen - alpha * x0) / sigma
        return eps if prediction_type == "epsilon" else alpha * eps - sigma * x0

    calls, levels = [], alphas_of_calls(ours, timesteps)
    end = loop(ours, timesteps, start, oracle)[-1]
    assert ours._sage_trajectory.table is not None
    assert (end - x0).abs().max() < 2e-3
    assert (start - x0).abs().max() > 0.5


def alphas_of_calls(scheduler, timesteps):
    """The signal scale at which each call sees the sample."""
    if not hasattr(scheduler, "sigmas"):
        return scheduler.alphas_cumprod[timesteps.long()].float().sqrt()
    sigmas = scheduler.sigmas[: len(timesteps)].clone()
    if hasattr(scheduler, "sigmas_interpol"):
        shift = 0 if isinstance(scheduler, schedulers.KDPM2DiscreteScheduler) else -1
        sigmas[1::2] = scheduler.sigmas_interpol[1 + shift : len(timesteps) + shift : 2]
    return 1 / (sigmas**2 + 1).sqrt()


# ---- what leaves the table, copies, repeated runs


@pytest.mark.parametrize("name", [n for n in TABLE if "thresholding" in inspect.signature(getattr(schedulers, n)).parameters])
def test_thresholding_is_the_classs_own_step_bit_for_bit(name):
    stock, ours = make(name, thresholding=True, sample_max_value=1.5)
    assert torch.equal(run(ours, 4), run(stock, 4))
    assert "thresholding" in ours._sage_trajectory.reason


@pytest.mark.parametrize("name", TABLE)
def test_setting_the_timesteps_again_starts_afresh(name):
    _, ours = make(name)
    first = run(ours, 6)
    run(ours, 3)
    half = steps_of(ours)[: len(ours.timesteps) // 2]
    loop(ours, half, gaussian(9))
    assert torch.equal(run(ours, 6), first)


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))], ids=["deepcopy", "pickle"])
def test_copies_go_on_where_the_original_is(name, clone):
    _, ours = make(name)
    timesteps = steps_of(ours)
    cut = 1 if name == "SCMScheduler" else 5  # in two-stage solvers this is inside a step
    x = loop(ours, timesteps[:cut], gaussian(1))[-1]
    other = clone(ours)
    assert isinstance(other, SageScheduler) and other is not ours and dict(other.config) == dict(ours.config)
    expected = loop(ours, timesteps[cut:], x)
    assert torch.equal(loop(other, timesteps[cut:], x), expected)
