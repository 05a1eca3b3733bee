"""sage.enable on Stable Diffusion: what is left behind, whose loops it refuses, which arguments."""

import copy
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from diffusers import DDIMScheduler
from sd_calls import LEAVES, NEGATIVES, PROMPTS, SEEDS, STEPS, draw, flat
from tiny import stable_diffusion

import sage
from sage import Leaf, SharingPlan


@pytest.fixture
def pipe():
    return stable_diffusion()


# ---- left as it was


def test_disable_gives_the_pipeline_back(pipe):
    before, cls, scheduler = draw(pipe), type(pipe), pipe.scheduler
    attributes, hooks = set(pipe.__dict__), len(pipe.unet._forward_hooks) + len(pipe.unet._forward_pre_hooks)
    sharing = sage.enable(pipe, flat())
    assert isinstance(pipe, cls)
    draw(pipe)
    sharing.disable()
    assert type(pipe) is cls
    assert pipe.scheduler is scheduler and type(scheduler) is DDIMScheduler
    assert set(pipe.__dict__) == attributes
    assert len(pipe.unet._forward_hooks) + len(pipe.unet._forward_pre_hooks) == hooks
    assert torch.equal(draw(pipe), before)
    copy.deepcopy(pipe)


def test_an_exception_inside_a_call_leaves_the_pipeline_clean(pipe):
    before = draw(pipe)

    def fail(*args):
        raise KeyError("from a callback")

    with sage.enable(pipe, flat()):
        with pytest.raises(KeyError, match="from a callback"):
            draw(pipe, callback_on_step_end=fail)
        assert type(pipe.scheduler) is DDIMScheduler and not pipe.unet._forward_hooks
        draw(pipe)
    assert torch.equal(draw(pipe), before)


def test_enabling_again_replaces_the_former_settings(pipe):
    cls = type(pipe)
    sage.enable(pipe, flat(0.5))
    sharing = sage.enable(pipe, flat(0.25))
    draw(pipe)
    assert sharing.stats["rows"].count(2) == 2
    sharing.disable()
    assert type(pipe) is cls


def test_a_pipeline_saved_while_enabled_loads_without_this_package(pipe, tmp_path):
    pipe.scheduler = sage.SageScheduler.from_config(pipe.scheduler.config, solver="dpm++2m")
    with sage.enable(pipe, flat()):
        draw(pipe)
        pipe.save_pretrained(tmp_path)
    script = (
        "import sys\n"
        "sys.modules['sage'] = sys.modules['sage_kernels'] = None\n"
        "from diffusers import DiffusionPipeline\n"
        f"pipe = DiffusionPipeline.from_pretrained({str(tmp_path)!r}, local_files_only=True)\n"
        "print(type(pipe).__name__, type(pipe.scheduler).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["StableDiffusionPipeline", "DPMSolverMultistepScheduler"], done.stderr


def test_two_pipelines_with_one_unet_in_two_threads(pipe):
    """A denoiser in common obeys, in each thread, the pipeline that is running there."""
    other = type(pipe)(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)}, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    expected_stock = draw(pipe)
    with sage.enable(pipe, flat()):
        expected_shared = draw(pipe)
        assert torch.equal(draw(other), expected_stock)
        results = {}
        threads = [
            threading.Thread(target=lambda: results.__setitem__("shared", draw(pipe))),
            threading.Thread(target=lambda: results.__setitem__("stock", draw(other))),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert torch.equal(results["shared"], expected_shared)
    assert torch.equal(results["stock"], expected_stock)


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_a_copy_of_an_enabled_pipeline_is_a_stock_pipeline(pipe, clone):
    cls = type(pipe)
    with sage.enable(pipe, flat()):
        other = clone(pipe)
        assert type(other) is cls and "_sage_sharing" not in other.__dict__
        draw(pipe)
        sage.disable(other)
        assert type(pipe) is not cls, "disabling the copy must not disable the original"


def test_stats_count_rows_when_guidance_ends_early(pipe):
    def stop_guiding(pipe, step, timestep, tensors):
        if step == 2:
            pipe._guidance_scale = 1.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
        return tensors

    with sage.enable(pipe, flat()) as sharing:
        draw(pipe, callback_on_step_end=stop_guiding, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
    assert sharing.stats["rows"] == [2, 2, 2, 5, 5, 5] and sharing.stats["nfe"] == 21
    assert sharing.stats["denoiser_rows"] == 2 * 6 + 15


# ---- loops that would go wrong silently


def test_another_loop_on_the_same_scheduler_is_refused(pipe):
    stock = type(pipe)(**pipe.components, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)

    def call(other):
        return lambda *args: other("x", num_inference_steps=2, output_type="latent") and {}

    with sage.enable(pipe, flat()):
        with pytest.raises(RuntimeError, match="set_timesteps was called in the middle of a shared call"):
            draw(pipe, callback_on_step_end=call(stock))
    with sage.enable(pipe, share=0.0) as sharing:
        sharing.plan, sharing._fixed_plan = None, SharingPlan.independent([Leaf("x")])
        with pytest.raises(RuntimeError, match="while a shared call on the same scheduler object is under way"):
            pipe("x", num_inference_steps=2, callback_on_step_end=call(pipe))
    assert type(pipe.scheduler) is DDIMScheduler and "_sage_run" not in pipe.scheduler.__dict__


def test_a_step_replaced_on_the_scheduler_object_is_refused(pipe):
    """The plan is followed in the step that a shared call brings; this one would hide it."""
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda *args, **kwargs: step(*args, **kwargs)
    try:
        with sage.enable(pipe, flat()):
            with pytest.raises(RuntimeError, match="DDIMScheduler.step was replaced on this object"):
                draw(pipe)
    finally:
        del pipe.scheduler.step


def test_a_method_replaced_on_the_scheduler_object_is_respected(pipe):
    scale = pipe.scheduler.scale_model_input
    pipe.scheduler.scale_model_input = lambda sample, timestep: 1.1 * scale(sample, timestep)
    try:
        expected = draw(pipe)
        with sage.enable(pipe, SharingPlan.independent(LEAVES)) as sharing:
            assert torch.equal(draw(pipe), expected)
        assert "scale_model_input was replaced on this object" in sharing.stats["solver_path"]
    finally:
        del pipe.scheduler.scale_model_input


def test_another_pipeline_inside_a_callback_is_not_shared(pipe):
    """It has the same U-Net and a scheduler of its own: its pictures are its own, and nothing of them is counted."""
    other = type(pipe)(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)}, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    expected, inside = draw(other), []
    with sage.enable(pipe, flat()) as sharing:
        plain = draw(pipe)
        counted = sharing.stats["launches"], sharing.stats["denoiser_rows"]
        got = draw(pipe, callback_on_step_end=lambda *args: inside.append(draw(other)) or {})
    assert len(inside) == STEPS and all(torch.equal(latents, expected) for latents in inside)
    assert torch.equal(got, plain) and (sharing.stats["launches"], sharing.stats["denoiser_rows"]) == counted


def test_a_handle_can_be_entered_again(pipe):
    sharing = sage.enable(pipe, flat())
    for _ in range(2):
        with sharing:
            draw(pipe)
        assert sharing.stats["rows"] == [2] * 3 + [5] * 3
        draw(pipe)


def test_a_step_on_other_rows_than_the_plans_is_refused(pipe):
    def step_doubled(pipe, step, timestep, tensors):
        doubled = torch.cat([tensors["latents"]] * 2)
        pipe.scheduler.step(doubled, timestep, doubled)

    with sage.enable(pipe, flat()):
        with pytest.raises(ValueError, match="sample has 10 rows, but the plan has 5 pictures"):
            draw(pipe, callback_on_step_end=step_doubled)


# ---- bad input


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(share=1.5), r"share must be in \[0, 1\], got 1.5"),
        (dict(share=float("nan")), r"share must be in \[0, 1\], got nan"),
        (dict(similarity=-1), r"similarity must be in \(-1, 1\], got -1.0"),
        (dict(max_group_size=0), "max_group_size must be at least 1, got 0"),
        (dict(max_rows=0), "max_rows must be at least 1, got 0"),
        (dict(rules={"x": "sum"}), "rules\\['x'\\] must be one of 'mean'"),
    ],
)
def test_bad_arguments_are_refused_by_enable(pipe, change, message):
    cls = type(pipe)
    with pytest.raises(ValueError, match=message):
        sage.enable(pipe, **change)
    assert type(pipe) is cls


def test_enable_wants_a_pipeline(pipe):
    with pytest.raises(TypeError, match="pipe must be a diffusers pipeline, got UNet2DConditionModel"):
        sage.enable(pipe.unet)
    with pytest.raises(TypeError, match="plan must be a sage.SharingPlan or None, got dict"):
        sage.enable(pipe, {})


def test_a_plan_for_other_prompts_is_refused_before_the_denoiser_runs(pipe, monkeypatch):
    monkeypatch.setattr(pipe.unet.conv_in, "forward", lambda x: pytest.fail("the denoiser ran"))
    with sage.enable(pipe, flat()):
        with pytest.raises(ValueError, match="plan is for 5 pictures, but the call asks for 4"):
            draw(pipe, PROMPTS[:4], NEGATIVES[:4], SEEDS[:4])
        with pytest.raises(ValueError, match="picture 0 is planned as 'a red cat', but the call asks for 'a green cat'"):
            draw(pipe, PROMPTS[::-1])


def test_an_unknown_batched_argument_is_named(pipe, monkeypatch):
    from sage import families

    monkeypatch.delitem(families.RULES, "encoder_hidden_states")
    with sage.enable(pipe, flat()):
        with pytest.raises(ValueError, match="'encoder_hidden_states' has 10 rows, one per latent, and no rule"):
            draw(pipe)
    with sage.enable(pipe, flat(), rules={"encoder_hidden_states": "mean"}):
        draw(pipe)
