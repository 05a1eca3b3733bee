"""The cases of test_scheduler_parity.py: scheduler classes with their options, whose rows are compared with diffusers."""

import itertools

import numpy as np

from sage.solvers import SOLVERS

EPS_V_X0 = ("epsilon", "v_prediction", "sample")
SPACINGS = ({"timestep_spacing": "linspace"}, {"timestep_spacing": "leading"}, {"timestep_spacing": "trailing"})
SPACED_SIGMAS = ({"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True})
FINALS = ({"final_sigmas_type": "zero"}, {"final_sigmas_type": "sigma_min"})
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SHIFTED_FLOW = {**FLOW, "flow_shift": 3.0}


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

    add_other_classes(case, predictions)
    for cls, overrides in [SOLVERS[name] for name in SOLVERS]:
        case(cls, overrides, steps=1)
        case(cls, overrides, steps=2)
        case(cls, overrides, steps=10, begin=8 if cls.startswith("KDPM2Ancestral") else 9)  # from mid-step: NaN
    for steps in (14, 15):
        case(dpm, {"solver_order": 3, **FINALS[1]}, steps=steps)
    return found


def add_other_classes(case, predictions):
    """Cases of the classes that few models come with."""
    deis, deis_schedules = "DEISMultistepScheduler", SPACINGS + SPACED_SIGMAS + (SHIFTED_FLOW,)
    for schedule, order in itertools.product(deis_schedules, (1, 2, 3)):
        case(deis, schedule, {"solver_order": order})
    for p, order in itertools.product(predictions, (2, 3)):
        case(deis, p, {"solver_order": order}, steps=17, begin=5)
        case(deis, p, {"solver_order": order, "lower_order_final": False})
    case(deis, FLOW, {"use_dynamic_shifting": True}, steps={"num_inference_steps": 7, "mu": 0.9})

    for p, schedule in itertools.product(predictions, SPACINGS + SPACED_SIGMAS):
        case("LMSDiscreteScheduler", p, schedule)
    for p, begin in itertools.product(predictions, (1, 2, 5)):
        case("LMSDiscreteScheduler", p, steps=10, begin=begin)

    for cls in ("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"):
        for p, schedule in itertools.product(predictions[:2], SPACINGS + SPACED_SIGMAS):
            case(cls, p, schedule, steps=6)
        for p in predictions[:2]:
            case(cls, p, steps=6, begin=4)
    case("KDPM2DiscreteScheduler", steps=6, begin=3)  # mid-step: diffusers then pairs equal sigmas

    single = "DPMSolverSinglestepScheduler"
    kinds = [{"algorithm_type": a} for a in ("dpmsolver++", "sde-dpmsolver++")]
    types, orders = [{"solver_type": t} for t in ("midpoint", "heun")], [{"solver_order": k} for k in (1, 2, 3)]
    for kind, form, order, final in itertools.product(kinds, types, orders, FINALS):
        case(single, kind, form, order, final, {"lower_order_final": True})
    for p, order, steps in itertools.product(predictions, orders[1:], (10, 12)):
        case(single, p, order, {"lower_order_final": True}, steps=steps)
        case(single, p, order, {"lower_order_final": True}, steps=steps, begin=4)
    for schedule in SPACED_SIGMAS + (SHIFTED_FLOW,):
        case(single, schedule, {"solver_order": 3, "lower_order_final": True})
    case(single, FINALS[1], {"solver_order": 3, "lower_order_final": False})
    case(single, steps={"timesteps": [990, 700, 650, 201, 33, 5]}, begin=1)

    edm = "EDMDPMSolverMultistepScheduler"
    for p, schedule, final in itertools.product(predictions[:2], ("karras", "exponential"), FINALS):
        case("EDMEulerScheduler", p, final, {"sigma_schedule": schedule})
        for order in (1, 2, 3):
            case(edm, p, final, {"sigma_schedule": schedule, "solver_order": order})
    for order, form in itertools.product((1, 2), ("midpoint", "heun")):
        case(edm, {"algorithm_type": "sde-dpmsolver++", "solver_order": order, "solver_type": form})
        case(edm, FINALS[1], {"solver_order": order, "solver_type": form, "sigma_max": 40.0}, steps=17, begin=5)
    case(edm, {"euler_at_final": True, "solver_order": 3, "sigma_data": 1.0}, steps=16)
    case("EDMEulerScheduler", {"sigma_data": 1.0, "sigma_max": 20.0}, begin=3)

    for p, eta in itertools.product(predictions, (0.0, 0.2, 0.3, 0.77, 1.0)):
        case("TCDScheduler", p, steps=5, eta=eta)
    for p in predictions:
        case("TCDScheduler", p, steps=4)
        case("TCDScheduler", p, steps={"num_inference_steps": 5, "original_inference_steps": 20}, begin=2)
        case("TCDScheduler", p, steps={"timesteps": [999, 519, 259], "strength": 0.7}, eta=0.5)
        case("CogVideoXDDIMScheduler", p)
        case("CogVideoXDDIMScheduler", p, {"timestep_spacing": "trailing", "snr_shift_scale": 1.0}, begin=3)
    for cls in ("TCDScheduler", "CogVideoXDDIMScheduler"):
        case(cls, predictions[1], {"rescale_betas_zero_snr": True}, steps=4)
    case("CogVideoXDDIMScheduler", predictions[1], ZERO_SNR)

    case("SCMScheduler", steps={"num_inference_steps": 2})
    case("SCMScheduler", {"sigma_data": 1.0}, steps={"num_inference_steps": 6, "intermediate_timesteps": None}, begin=2)
    for shift, steps in itertools.product((1.0, 3.0), (1, 2, 7)):
        case("FlowMatchHeunDiscreteScheduler", {"shift": shift}, steps=steps)
    case("FlowMatchHeunDiscreteScheduler", steps=6, begin=4)
    case("FlowMatchHeunDiscreteScheduler", steps=6, begin=3)
    for schedule in ({}, {"shift": 3.0}, {"shift_terminal": 0.02}) + SPACED_SIGMAS:
        case("FlowMatchLCMScheduler", schedule)
    case("FlowMatchLCMScheduler", {"use_dynamic_shifting": True}, steps={"num_inference_steps": 8, "mu": 1.15}, begin=2)
    for eta, s_noise in ((0.0, 1.0), (0.5, 1.0), (1.0, 0.7), (1.0, 0.0)):
        case("LTXEulerAncestralRFScheduler", {"eta": eta, "s_noise": s_noise})
    case("LTXEulerAncestralRFScheduler", steps={"sigmas": [1.0, 0.8, 0.3, 0.1, 0.0]})  # as many timesteps as sigmas
    case("LTXEulerAncestralRFScheduler", steps={"sigmas": [0.9, 0.725, 0.42, 0.2]}, begin=1)
