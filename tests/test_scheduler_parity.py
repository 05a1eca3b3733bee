"""Every table row against diffusers' own `step`, over whole trajectories.

Four trajectories per case, all from the same draws: diffusers' class and the table's rows, in float64 and in float32. In
float64, diffusers' own code runs with its `torch.float32` bound to float64 and its schedule cast to float64, so that only
rounding is left between the two: 1e-13 at worst where this was written. In float32, both run as users run them, and each is
compared with the float64 trajectory: the table is 6e-6 away at worst, diffusers 5e-5 (Heun), and the table's error is 0.7
times diffusers' at the median, 2.4 times at worst. The test allows 1e-5, and 3 times diffusers' error plus 1e-6.
An error is max|difference| / max|sample| at its worst step. The model depends on its input and on the timestep, so an
error in one step reaches the later ones.
"""

import dataclasses
import importlib
import itertools

import numpy as np
import pytest
import torch
from diffusers import schedulers

from sage.solvers import SOLVERS, coverage, noise_draws, table_for
from sage_kernels.coefficients import COLUMNS

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers under numpy 2
SHAPE = (2, 3, 4, 5)
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
EPS_V_X0 = ("epsilon", "v_prediction", "sample")
SPACINGS = ({"timestep_spacing": "linspace"}, {"timestep_spacing": "leading"}, {"timestep_spacing": "trailing"})
SPACED_SIGMAS = ({"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True})
FINALS = ({"final_sigmas_type": "zero"}, {"final_sigmas_type": "sigma_min"})
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def model(x, t):
    """Stands for the denoiser: bounded, and different for every input and timestep."""
    return torch.tanh(x + 0.003 * float(t)) + 0.2 * torch.cos(2 * x)


def draw(shape, generator=None, device=None, dtype=None):
    """`randn_tensor` drawn in float32 whatever the dtype, so that both precisions see the same noise."""
    return torch.randn(shape, generator=generator).to(dtype)


class _Double:
    """`torch` for a scheduler module, with float64 in the place of float32."""

    def __getattr__(self, name):
        return torch.float64 if name == "float32" else getattr(torch, name)


def run_in_double(patch, scheduler):
    """Make `scheduler` compute its steps in float64, from the schedule it has."""
    module = importlib.import_module(type(scheduler).__module__)
    patch.setattr(module, "torch", _Double())
    patch.setattr(module, "randn_tensor", draw, raising=False)
    for name in ("alphas_cumprod", "final_alpha_cumprod", "one", "sigmas"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())


def make(cls, config, steps=9):
    """The scheduler after set_timesteps; `steps` is their number or a dict of set_timesteps' arguments."""
    scheduler = getattr(schedulers, cls)(**(({} if cls.startswith("Flow") else STABLE_DIFFUSION) | config))
    scheduler.set_timesteps(**(steps if isinstance(steps, dict) else {"num_inference_steps": steps}))
    return scheduler


def diffusers_trajectory(scheduler, dtype, seed, begin=0, **step_arguments):
    """Samples after every step, and what `step` returns as the denoised sample (None if nothing): [steps, *SHAPE]."""
    generator = torch.Generator().manual_seed(seed)
    x = draw(SHAPE, generator, dtype=dtype)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    if noise_draws(scheduler, eta=step_arguments.get("eta", 0.0)).any():
        step_arguments["generator"] = generator
    samples, denoised = [], []
    for t in scheduler.timesteps[begin:]:
        t = t.item()  # diffusers multiplies tensor timesteps in float32 (LCM)
        model_input = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        out = scheduler.step(model(model_input, t), t, x, return_dict=False, **step_arguments)
        x = out[0]
        samples.append(x)
        denoised.extend(out[1:])
    return torch.stack(samples), torch.stack(denoised) if denoised else None


def table_trajectory(table, dtype, seed, begin, draws):
    """The same by the table's rows, the formula written out: float64 coefficients, or the float32 tensor."""
    rows = table.rows if dtype == torch.float64 else table.tensor("cpu").numpy()
    generator = torch.Generator().manual_seed(seed)
    x = draw(SHAPE, generator, dtype=dtype)
    missing = torch.full(SHAPE, float("nan"), dtype=dtype)  # reading what is not there yet must show
    last, history, model_input = missing, [missing] * 3, x * table.input_scale
    samples, denoised = [], []

    def total(*terms):  # a coefficient of 0 never reads its input
        return sum((float(k) * v for k, v in terms if k != 0), torch.zeros(SHAPE, dtype=dtype))

    for i in range(begin, len(table)):
        k = dict(zip(COLUMNS, rows[i]))
        y = model(model_input, table.timesteps[i])
        noise = draw(SHAPE, generator, dtype=dtype) if draws[i] else missing
        m0 = total((k["p"], x), (k["q"], y)).clamp(-float(k["clip"]), float(k["clip"]))
        m1, m2, m3 = history
        xc = total((k["u0"], x), (k["u1"], last), (k["u2"], m0), (k["u3"], m1), (k["u4"], m2), (k["u5"], m3))
        x = total((k["a"], xc), (k["b0"], m0), (k["b1"], m1), (k["b2"], m2), (k["e"], y), (k["c"], noise))
        model_input, last, history = float(k["s"]) * x, xc, [m0, m1, m2]
        samples.append(x)
        denoised.append(m0)
    return torch.stack(samples), torch.stack(denoised)


def error(ours, theirs):
    """Worst over the steps of max|difference| / max|theirs|; inf where something is not finite."""
    ours, theirs = ours.double().flatten(1), theirs.double().flatten(1)
    value = ((ours - theirs).abs().amax(1) / theirs.abs().amax(1)).max().item()
    return value if np.isfinite(value) else float("inf")


def trajectories(cls, config, steps=9, begin=0, dtype=torch.float64, change=None, seed=5, **step_arguments):
    """((samples, denoised) of diffusers, the same of the table), with `change` applied to the table's rows."""
    scheduler = make(cls, config, steps)
    eta = step_arguments.get("eta", 0.0)
    table = table_for(scheduler, begin=begin, eta=eta)
    if change is not None:
        table = dataclasses.replace(table, rows=change(table.rows.copy()))
    ours = table_trajectory(table, dtype, seed, begin, noise_draws(scheduler, begin=begin, eta=eta))
    with pytest.MonkeyPatch.context() as patch:
        if dtype == torch.float64:
            run_in_double(patch, scheduler)
        theirs = diffusers_trajectory(scheduler, dtype, seed, begin, **step_arguments)
    return theirs, ours


def cases():
    """(class, config, and what else `parity` takes)."""

    def case(cls, *configs, **others):
        merged = {}
        for config in configs:
            merged |= config
        found.append((cls, merged, others))

    found = []
    predictions = [{"prediction_type": p} for p in EPS_V_X0]
    for p, spacing, one in itertools.product(predictions, SPACINGS, (True, False)):
        case("DDIMScheduler", p, spacing, {"set_alpha_to_one": one, "clip_sample": False})
    for p, eta in itertools.product(predictions, (0.0, 0.4, 1.0)):
        case("DDIMScheduler", p, {"clip_sample": True, "clip_sample_range": 0.8}, eta=eta)
        case("DDIMScheduler", p, {"clip_sample": False, "steps_offset": 1}, eta=eta, begin=4)
        case("DDIMParallelScheduler", p, {"clip_sample": False}, eta=eta)
    for p, variance, spacing in itertools.product(
        predictions, ("fixed_small", "fixed_small_log", "fixed_large"), SPACINGS
    ):
        case("DDPMScheduler", p, spacing, {"variance_type": variance, "clip_sample": False})
    for p in predictions:
        case("DDPMScheduler", p, {"clip_sample_range": 1.3})
        case("DDPMScheduler", p, {"clip_sample": False}, steps={"timesteps": [990, 700, 650, 201, 33, 5]}, begin=2)
        case("DDPMParallelScheduler", p, {"clip_sample": False})
        case("LCMScheduler", p, steps=4)
        case("LCMScheduler", p, {"clip_sample": True, "clip_sample_range": 0.9, "timestep_scaling": 0.01}, steps=6)
        case("LCMScheduler", p, steps={"num_inference_steps": 5, "original_inference_steps": 20}, begin=2)
        case("LCMScheduler", p, steps={"timesteps": [999, 519, 259], "strength": 0.7})
    for p in predictions[1:]:
        for cls in ("DDIMScheduler", "DDPMScheduler"):
            case(cls, p, ZERO_SNR, {"clip_sample": False})
        case("LCMScheduler", p, {"rescale_betas_zero_snr": True}, steps=4)

    for p, schedule, final in itertools.product(predictions, SPACINGS + SPACED_SIGMAS, FINALS):
        case("EulerDiscreteScheduler", p, schedule, final)
    for p, schedule in itertools.product(predictions, SPACINGS + SPACED_SIGMAS):
        case("HeunDiscreteScheduler", p, schedule, steps=6)
    for p in predictions:
        case("EulerDiscreteScheduler", p, {"interpolation_type": "log_linear", **SPACED_SIGMAS[0]}, begin=3)
        case("EulerDiscreteScheduler", p, steps={"sigmas": [12.0, 5.0, 2.5, 0.6, 0.1, 0.0]})
        case("EulerDiscreteScheduler", p, ZERO_SNR)
        case("HeunDiscreteScheduler", p, {"clip_sample": True, "clip_sample_range": 0.7}, steps=6)
        case("HeunDiscreteScheduler", p, steps=6, begin=4)
        case("HeunDiscreteScheduler", p, steps=6, begin=3)  # mid-step: diffusers then pairs equal sigmas
    case("EulerDiscreteScheduler", {"prediction_type": "v_prediction", "timestep_type": "continuous"})
    for p, spacing in itertools.product(predictions[:2], SPACINGS):
        case("EulerAncestralDiscreteScheduler", p, spacing)
        case("EulerAncestralDiscreteScheduler", p, spacing, {"rescale_betas_zero_snr": True}, begin=3)

    dpm = "DPMSolverMultistepScheduler"
    dpm_schedules = SPACINGS + SPACED_SIGMAS + ({"use_lu_lambdas": True}, {**FLOW, "flow_shift": 3.0})
    orders = [{"solver_order": k} for k in (1, 2, 3)]
    kinds = [{"algorithm_type": a} for a in ("dpmsolver++", "sde-dpmsolver++")]
    for p, order, kind in itertools.product(predictions, orders, kinds):
        case(dpm, p, order, kind)
        case(dpm, p, order, kind, {"use_karras_sigmas": True}, steps=17, begin=5)
    for schedule, final, order in itertools.product(dpm_schedules, FINALS, orders[1:]):
        case(dpm, schedule, final, order)
    for kind, steps, final in itertools.product(kinds, (8, 16), FINALS):
        case(dpm, kind, final, {"solver_type": "heun"}, steps=steps)
        case(dpm, kind, final, {"solver_order": 3, "lower_order_final": False}, steps=steps)
        case(dpm, kind, final, {"solver_order": 3, "euler_at_final": True, "lower_order_final": False}, steps=steps)
    for p in predictions:
        case(dpm, p, ZERO_SNR)
        case(dpm, {"use_flow_sigmas": True}, p)
    case(dpm, {"prediction_type": "flow_prediction"}, kinds[1])
    case(dpm, FLOW, {"use_dynamic_shifting": True}, steps={"num_inference_steps": 7, "mu": 0.9})
    case(dpm, {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1})

    uni = "UniPCMultistepScheduler"
    kinds = [{"solver_type": "bh1", "final_sigmas_type": "sigma_min"}, {"solver_type": "bh2"}]
    for p, order, kind in itertools.product(predictions, orders, kinds):
        case(uni, p, order, kind)
        case(uni, p, order, kind, steps=17, begin=5)
    uni_schedules = SPACINGS + SPACED_SIGMAS + ({**FLOW, "flow_shift": 5.0}, {**FLOW, "use_karras_sigmas": True})
    for schedule, final, order in itertools.product(uni_schedules, FINALS, orders[1:]):
        case(uni, schedule, final, order)
    for order in orders:
        case(uni, order, {"disable_corrector": [0, 1, 4]})
        case(uni, order, FINALS[1], {"lower_order_final": False})
    for p in predictions:
        case(uni, p, ZERO_SNR)
        case(uni, {"use_flow_sigmas": True}, p)
    case(uni, FLOW, {"shift_terminal": 0.1})
    case(uni, FLOW, {"use_dynamic_shifting": True}, steps={"num_inference_steps": 7, "mu": 0.9})
    case(uni, FLOW, steps={"sigmas": np.array([0.9, 0.7, 0.4, 0.35, 0.1])})

    flow = "FlowMatchEulerDiscreteScheduler"
    flow_schedules = ({}, {"shift": 3.0}, {"shift_terminal": 0.02}, {"invert_sigmas": True}) + SPACED_SIGMAS
    for schedule, stochastic in itertools.product(flow_schedules, (False, True)):
        case(flow, schedule, {"stochastic_sampling": stochastic})
    for shift in ("exponential", "linear"):
        dynamic = {"use_dynamic_shifting": True, "time_shift_type": shift}
        case(flow, dynamic, steps={"num_inference_steps": 8, "mu": 1.15}, begin=2)
    case(flow, steps={"sigmas": [1.0, 0.8, 0.3, 0.2]})

    for cls, overrides in [SOLVERS[name] for name in SOLVERS]:
        case(cls, overrides, steps=1)
        case(cls, overrides, steps=2)
        case(cls, overrides, steps=10, begin=9)
    for steps in (14, 15):
        case(dpm, {"solver_order": 3, **FINALS[1]}, steps=steps)
    return found


CASES = cases()


def describe(case):
    cls, config, others = case
    short = cls.replace("Scheduler", "").replace("Discrete", "").replace("Multistep", "")
    words = [f"{k}={v}" if not isinstance(v, str) else v for k, v in {**config, **others}.items()]
    return "-".join([short, *words]).replace(" ", "").replace("use_", "").replace("=True", "")


def test_there_are_enough_cases_and_all_differ():
    assert len(CASES) >= 150
    assert len({repr(case) for case in CASES}) == len(CASES)
    assert {cls for cls, _, _ in CASES} == {name for name, how in coverage().items() if how == "table"}


@pytest.mark.parametrize("case", CASES, ids=describe)
def test_parity(case):
    cls, config, others = case
    (theirs, returned), (ours, stored) = trajectories(cls, config, **others)
    assert error(ours, theirs) < 1e-11
    if returned is not None and not (cls == "LCMScheduler" and config.get("clip_sample")):  # there x0 is stored
        assert error(stored, returned) < 1e-11

    (theirs32, _), (ours32, _) = trajectories(cls, config, dtype=torch.float32, **others)
    assert error(ours32, theirs) < min(1e-5, 3 * error(theirs32, theirs) + 1e-6)


# Changes that a table must not survive: each is one plausible mistake.
def swap(first, second):
    def change(rows):
        i, j = COLUMNS.index(first), COLUMNS.index(second)
        rows[:, [i, j]] = rows[:, [j, i]]
        return rows

    return change


def zero(name, value=0.0):
    def change(rows):
        rows[:, COLUMNS.index(name)] = value
        return rows

    return change


def later_row(rows):
    return np.concatenate([rows[1:], rows[-1:]])


def first_row_again(rows):
    rows[3] = rows[1]
    return rows


THIRD = {"solver_order": 3}
MISTAKES = [
    ("DPMSolverMultistepScheduler", THIRD, swap("b1", "b2")),
    ("DPMSolverMultistepScheduler", {}, swap("b0", "b1")),
    ("DPMSolverMultistepScheduler", {}, zero("b1")),
    ("DPMSolverMultistepScheduler", {}, first_row_again),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, zero("c")),
    ("UniPCMultistepScheduler", THIRD, swap("u3", "u4")),
    ("UniPCMultistepScheduler", THIRD, swap("u4", "u5")),
    ("UniPCMultistepScheduler", THIRD, swap("u1", "u0")),
    ("UniPCMultistepScheduler", {}, zero("u0", 1.0)),
    ("HeunDiscreteScheduler", {}, swap("u0", "u1")),
    ("DDIMScheduler", {"clip_sample_range": 0.8}, zero("e")),
    ("DDIMScheduler", {"clip_sample_range": 0.8}, zero("clip", np.inf)),
    ("EulerDiscreteScheduler", {}, zero("s", 1.0)),
    ("LCMScheduler", {}, zero("c")),
] + [(cls, {}, later_row) for _, (cls, _) in SOLVERS.items() if cls not in ("DPMSolverMultistepScheduler",)]


@pytest.mark.parametrize("cls, config, change", MISTAKES)
def test_a_wrong_table_is_caught(cls, config, change):
    (theirs, _), (ours, _) = trajectories(cls, config, change=change, seed=11)
    assert error(ours, theirs) > 1e-3


@pytest.mark.parametrize("cls", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_warm_up_counts_from_begin(cls):
    whole, tail = table_for(make(cls, THIRD)), table_for(make(cls, THIRD), begin=3)
    assert not tail.rows[:3].any()
    assert not np.array_equal(whole.rows[3], tail.rows[3]) and not np.array_equal(whole.rows[4], tail.rows[4])
    np.testing.assert_array_equal(whole.rows[6:], tail.rows[6:])


def test_equal_last_sigmas_make_an_identity_where_diffusers_divides_by_zero():
    config = {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "lower_order_final": False, "solver_type": "heun"}
    (theirs, _), (ours, _) = trajectories("DPMSolverMultistepScheduler", config)
    assert error(ours[:-1], theirs[:-1]) < 1e-11 and not theirs[-1].isfinite().any()
    assert torch.equal(ours[-1], ours[-2])


def test_unipc_bh1_ends_at_x0_where_diffusers_multiplies_infinity_by_zero():
    (theirs, _), (ours, stored) = trajectories("UniPCMultistepScheduler", {"solver_type": "bh1"})
    assert error(ours[:-1], theirs[:-1]) < 1e-11 and not theirs[-1].isfinite().any()
    assert torch.equal(ours[-1], stored[-1])
