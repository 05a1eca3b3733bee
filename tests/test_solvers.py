"""What `sage.solvers` refuses and says, and its rules about diffusers' noise. Parity is in test_scheduler_parity.py."""

import importlib
import inspect

import numpy as np
import pytest
import torch
from diffusers import schedulers

from sage.info import schedulers_text
from sage.solvers import (
    SOLVERS,
    NotInTable,
    check_step_arguments,
    coverage,
    noise_draws,
    noise_dtype,
    solver_name,
    table_for,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers under numpy 2
    pytest.mark.filterwarnings("ignore:.*algorithm_types dpmsolver:FutureWarning"),
]
DPM, SINGLE, UNI = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"
ZERO_SNR_EPS = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "epsilon"}


def configured(cls, config, steps=9):
    scheduler = getattr(schedulers, cls)(**config)
    scheduler.set_timesteps(2 if cls == "SCMScheduler" else steps)
    return scheduler


def test_coverage_names_every_scheduler_with_a_reason():
    rows = coverage()
    assert set(rows) == {name for name in dir(schedulers) if name.endswith("Scheduler")} and len(rows) > 40
    assert {cls for cls, _ in SOLVERS.values()} < {name for name, how in rows.items() if how.table}
    for name, how in rows.items():
        assert how.table != bool(how.reason) and how.reason != "no solver function for this class", name
        assert how.solvers == tuple(solver for solver, (cls, _) in SOLVERS.items() if cls == name)
    assert "Brownian" in rows["DPMSolverSDEScheduler"].reason and "noise of the step before" in rows["SASolverScheduler"].reason


def test_coverage_agrees_with_what_table_for_does():
    for name, how in coverage().items():
        if not how.table:
            with pytest.raises(NotInTable, match=f"{name}: "):
                table_for(object.__new__(getattr(schedulers, name)))


def test_coverage_names_what_leaves_the_table():
    rows, checked = coverage(), set()
    for cls, config, arguments, message in REFUSED:
        known = set(inspect.signature(getattr(schedulers, cls).step).parameters) - {"variance_noise"}  # SageScheduler's own
        if not rows[cls].table or not arguments.keys() <= known or message in ("prediction_type 'flow'", "no finite coefficient"):
            continue
        checked.add((cls, message))
        names = [*arguments, *config]
        assert any(message in text or text.startswith(tuple(names)) for text in rows[cls].leaves), (cls, names, rows[cls].leaves)
    assert len(checked) > 25


def test_the_list_for_users_has_every_class_with_its_solvers_reason_and_options():
    tables, options, own = schedulers_text().split("\n\n")[1:]
    for name, how in coverage().items():
        line = next(line for line in (tables if how.table else own).splitlines() if line.split()[0] == name)
        assert line.split(None, 1)[1:] == ([f"solver {', '.join(how.solvers)}"] if how.solvers else [how.reason] if how.reason else [])
        assert ("; ".join(how.leaves) in options) and (f"  {name} " in options) == bool(how.leaves)


REFUSED = [
    ("DDIMScheduler", {"thresholding": True}, {}, "thresholding"),
    ("DDIMScheduler", ZERO_SNR_EPS, {}, "zero terminal SNR"),
    ("DDPMScheduler", ZERO_SNR_EPS, {}, "zero terminal SNR"),
    ("LCMScheduler", {"rescale_betas_zero_snr": True}, {}, "zero terminal SNR"),
    ("DDIMScheduler", {}, {"eta": 1.5}, "eta"),
    ("DDIMScheduler", {}, {"eta": -0.5}, "eta"),
    ("EulerDiscreteScheduler", {}, {"eta": 0.5}, "eta"),
    ("DDIMScheduler", {}, {"use_clipped_model_output": True}, "use_clipped_model_output"),
    ("DDIMScheduler", {}, {"variance_noise": torch.zeros(1)}, "variance_noise"),
    ("DDPMScheduler", {"thresholding": True}, {}, "thresholding"),
    ("DDPMScheduler", {"variance_type": "fixed_large_log"}, {}, "fixed_large_log"),
    ("DDPMScheduler", {"variance_type": "learned"}, {}, "learned"),
    ("DDPMScheduler", {"variance_type": "learned_range"}, {}, "learned_range"),
    ("DDPMScheduler", {"prediction_type": "flow"}, {}, "prediction_type 'flow'"),
    ("EulerDiscreteScheduler", {}, {"s_churn": 0.1}, "s_churn"),
    ("EulerDiscreteScheduler", {}, {"s_wobble": 0.1}, "s_wobble"),
    ("EulerAncestralDiscreteScheduler", {"prediction_type": "sample"}, {}, "prediction_type sample"),
    ("FlowMatchEulerDiscreteScheduler", {}, {"per_token_timesteps": torch.zeros(1)}, "per_token_timesteps"),
    ("LCMScheduler", {"thresholding": True}, {}, "thresholding"),
    (DPM, {"thresholding": True}, {}, "thresholding"),
    (DPM, {"variance_type": "learned_range"}, {}, "learned_range"),
    (DPM, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, {}, "algorithm_type dpmsolver"),
    (DPM, {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"}, {}, "algorithm_type sde-dpmsolver"),
    (UNI, {"thresholding": True}, {}, "thresholding"),
    (UNI, {"predict_x0": False}, {}, "predict_x0"),
    (UNI, {"solver_order": 4}, {}, "order 4"),
    (UNI, {"lower_order_final": False}, {}, "no finite coefficient"),  # order 2 to sigma 0; diffusers gives inf
    ("DEISMultistepScheduler", {"thresholding": True}, {}, "thresholding"),
    ("LMSDiscreteScheduler", {}, {"order": 3}, "order"),
    ("EDMEulerScheduler", {}, {"s_churn": 0.1}, "s_churn"),
    ("EDMEulerScheduler", {}, {"pred_original_sample": torch.zeros(1)}, "pred_original_sample"),
    ("EDMDPMSolverMultistepScheduler", {"thresholding": True}, {}, "thresholding"),
    ("KDPM2DiscreteScheduler", {"prediction_type": "sample"}, {}, "prediction_type sample"),
    ("KDPM2AncestralDiscreteScheduler", {"prediction_type": "sample"}, {}, "prediction_type sample"),
    (SINGLE, {"thresholding": True}, {}, "thresholding"),
    (SINGLE, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, {}, "algorithm_type dpmsolver"),
    (SINGLE, {"variance_type": "learned_range"}, {}, "learned_range"),
    ("TCDScheduler", {}, {"eta": 1.5}, "eta"),
    ("TCDScheduler", {"rescale_betas_zero_snr": True}, {}, "zero terminal SNR"),
    ("CogVideoXDDIMScheduler", ZERO_SNR_EPS, {}, "zero terminal SNR"),
    ("CogVideoXDDIMScheduler", {}, {"eta": 0.5}, "eta"),
    ("SCMScheduler", {"prediction_type": "epsilon"}, {}, "prediction_type epsilon"),
    ("FlowMatchHeunDiscreteScheduler", {}, {"s_churn": 0.1}, "s_churn"),
    ("FlowMatchLCMScheduler", {"scale_factors": [1.0], "upscale_mode": "nearest"}, {}, "scale_factors"),
    ("PNDMScheduler", {"skip_prk_steps": True}, {}, "PNDMScheduler: it drops one"),
    ("SASolverScheduler", {}, {}, "SASolverScheduler"),
]


@pytest.mark.parametrize("cls, config, arguments, message", REFUSED)
def test_refused(cls, config, arguments, message):
    scheduler = configured(cls, config)
    with pytest.raises(NotInTable, match=message):
        table_for(scheduler, **arguments)


def test_refused_solver_p():
    scheduler = configured(UNI, {})
    scheduler.solver_p = configured("DDIMScheduler", {})
    with pytest.raises(NotInTable, match="solver_p"):
        table_for(scheduler)


def test_zero_snr_with_epsilon_is_in_the_table_once_the_blind_step_is_behind():
    scheduler = configured("DDIMScheduler", ZERO_SNR_EPS)
    assert np.isfinite(table_for(scheduler, begin=1).rows[1:, :15]).all()


def test_neutral_step_arguments_pass():
    check_step_arguments(order=4)
    check_step_arguments(generator=None, return_dict=False, s_churn=0.0, s_tmin=0.0, s_tmax=float("inf"), s_noise=1.0)
    check_step_arguments(use_clipped_model_output=False, variance_noise=None, per_token_timesteps=None)


def test_subclasses_count_as_their_diffusers_class_unless_they_change_the_step():
    class OwnSchedule(schedulers.DDIMScheduler):
        def set_timesteps(self, *args, **kwargs):
            super().set_timesteps(*args, **kwargs)

    class OwnStep(schedulers.DDIMScheduler):
        def step(self, *args, **kwargs):
            return super().step(*args, **kwargs)

    class Wrapper(OwnStep):
        _sage_wrapper = True

    OwnStepMarked = type("OwnStepMarked", (schedulers.DDIMScheduler,), {"step": OwnStep.step, "_sage_wrapper": True})
    for cls in (OwnSchedule, OwnStepMarked):
        scheduler = cls()
        scheduler.set_timesteps(5)
        assert len(table_for(scheduler)) == 5
    for cls in (OwnStep, Wrapper):
        with pytest.raises(NotInTable, match="OwnStep: overrides step"):
            table_for(cls())


def test_set_timesteps_and_begin_are_checked():
    for cls in ("DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"):
        with pytest.raises(ValueError, match="set_timesteps"):
            table_for(getattr(schedulers, cls)())
    with pytest.raises(ValueError, match="begin must be one of the 9 steps"):
        table_for(configured("DDIMScheduler", {}), begin=9)


@pytest.mark.parametrize("name", SOLVERS)
def test_solver_names(name):
    cls, overrides = SOLVERS[name]
    scheduler = configured(cls, overrides)
    assert solver_name(scheduler) == table_for(scheduler).solver == name


def test_solver_name_outside_the_table():
    assert solver_name(configured("SASolverScheduler", {})) == "SASolverScheduler"


OTHER_NAMES = [
    ("edm-euler", "EDMEulerScheduler", {}),
    ("edm-dpm++2m", "EDMDPMSolverMultistepScheduler", {}),
    ("edm-dpm++2m-sde", "EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("dpm++3s-sde", SINGLE, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "lower_order_final": True}),
    ("scm", "SCMScheduler", {}),
    ("flow-euler-a", "LTXEulerAncestralRFScheduler", {}),
    ("flow-euler-sde", "FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    ("ddim", "CogVideoXDDIMScheduler", {}),
]


@pytest.mark.parametrize("name, cls, config", OTHER_NAMES)
def test_names_of_solvers_without_a_command_line_name(name, cls, config):
    scheduler = configured(cls, config)
    assert solver_name(scheduler) == table_for(scheduler).solver == name


def test_eta_is_the_classs_own_where_none_is_given():
    for cls, default in (("DDIMScheduler", 0.0), ("TCDScheduler", 0.3)):
        scheduler = configured(cls, {})
        np.testing.assert_array_equal(table_for(scheduler).rows, table_for(scheduler, eta=default).rows)
        assert inspect.signature(type(scheduler).step).parameters["eta"].default == default
        np.testing.assert_array_equal(noise_draws(scheduler), noise_draws(scheduler, eta=default))


def test_edm_euler_takes_sigmas_without_a_number_of_steps():
    scheduler = schedulers.EDMEulerScheduler()
    scheduler.set_timesteps(sigmas=torch.linspace(0, 1, 6))
    assert scheduler.num_inference_steps is None and len(table_for(scheduler)) == 6


DRAWING = [
    ("DDIMScheduler", {}, 0.0),
    ("DDIMScheduler", {}, 0.7),
    ("DDIMParallelScheduler", {}, 0.7),
    ("CogVideoXDDIMScheduler", {}, 0.0),
    ("TCDScheduler", {}, 0.3),
    ("TCDScheduler", {}, 0.0),
    ("KDPM2AncestralDiscreteScheduler", {}, 0.0),
    ("KDPM2DiscreteScheduler", {}, 0.0),
    (SINGLE, {"algorithm_type": "sde-dpmsolver++", "lower_order_final": True}, 0.0),
    (SINGLE, {"algorithm_type": "sde-dpmsolver++", "lower_order_final": True, "prediction_type": "sample"}, 0.0),
    ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, 0.0),
    ("EDMEulerScheduler", {}, 0.0),
    ("SCMScheduler", {}, 0.0),
    ("FlowMatchHeunDiscreteScheduler", {}, 0.0),
    ("FlowMatchLCMScheduler", {}, 0.0),
    ("LTXEulerAncestralRFScheduler", {}, 0.0),
    ("LTXEulerAncestralRFScheduler", {"eta": 0.0}, 0.0),
    ("DDPMScheduler", {}, 0.0),
    ("DDPMScheduler", {"timestep_spacing": "trailing"}, 0.0),
    ("EulerDiscreteScheduler", {}, 0.0),
    ("EulerAncestralDiscreteScheduler", {}, 0.0),
    ("LCMScheduler", {}, 0.0),
    (DPM, {}, 0.0),
    (DPM, {"algorithm_type": "sde-dpmsolver++"}, 0.0),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, 0.0),
]


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)])
@pytest.mark.parametrize("cls, config, eta", DRAWING)
def test_noise_is_expected_where_and_in_the_dtype_in_which_diffusers_draws_it(cls, config, eta, dtypes, monkeypatch):
    scheduler, drawn = configured(cls, config), []

    def record(shape, generator=None, device=None, dtype=None):
        drawn.append(dtype or torch.float32)
        return torch.zeros(shape, dtype=dtype)

    monkeypatch.setattr(importlib.import_module(type(scheduler).__module__), "randn_tensor", record, raising=False)
    x, y = torch.zeros(1, 3, 2, dtype=dtypes[0]), torch.zeros(1, 3, 2, dtype=dtypes[1])
    counts = [0]
    expected = noise_draws(scheduler, eta=eta)
    for t in scheduler.timesteps[: len(expected)]:
        scheduler.step(y, t, x, **({"eta": eta} if "DDIM" in cls or "TCD" in cls else {}))
        counts.append(len(drawn))
    np.testing.assert_array_equal(np.diff(counts) == 1, expected)
    assert set(drawn) <= {noise_dtype(scheduler, *dtypes)}
