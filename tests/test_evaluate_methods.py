"""What is drawn: paired seeds, plans inside the same groups, rivals of equal cost, adapters and caches that come and go."""

from pathlib import Path
from types import SimpleNamespace

import evaluation_parts as parts
import native_cases
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from sage.evaluation.asked import Source, ask, read_source
from sage.evaluation.command import Evaluation
from sage.evaluation.folder import EvaluationFolder
from sage.evaluation.identity import pipeline_identity
from sage.evaluation.methods import Method, grid, methods_at, planned, rivals
from sage.evaluation.request import METHODS, Adapter, Request
from sage.evaluation.runner import Runner, calls, costs, file_names, totals
from sage.evaluation.switches import adapted, cache_refusal, cached, check_adapters
from sage.prompts import InputError, PromptSet
from sage.seeds import leaf_seed

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 4


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    parts.patch(monkeypatch)


def asked_of(prompts=parts.PROMPTS, images=2, **options):
    usual = dict(seed=0, similarity=0.6, max_group_size=8, limit=None, everyone=False)
    return ask(Source(PromptSet("test", tuple(prompts))), images=images, **{**usual, **options})


@pytest.fixture(scope="module")
def pipe():
    return tiny.stable_diffusion()


def draw(pipe, plans, asked, out: Path, **options) -> Runner:
    folder = EvaluationFolder(out)
    folder.prepare()
    runner = Runner(pipe, asked, folder, guidance_scale=3.0, max_rows=64, run="now", say=lambda text: None, progress=False)
    runner.draw(plans, "grid", **options)
    return runner


def plans_of(asked, *methods):
    return {method: method.plan(asked) for method in methods}


def drawn(runner: Runner, method: Method) -> list[np.ndarray]:
    return [np.array(Image.open(file)).astype(int) for file in file_names(runner.folder, method)]


def worst(a, b) -> int:
    return max(int(abs(x - y).max()) for x, y in zip(a, b, strict=True))


# ---- prompts


def test_groups_are_kept_and_loners_are_not():
    asked = asked_of()
    assert [tuple(asked.prompts[row] for row in group) for group in asked.groups] == [
        tuple(parts.PROMPTS[row] for row in group) for group in parts.GROUPS
    ]
    assert (asked.read, asked.grouped, asked.pictures) == (8, 7, 14)
    assert asked.sets()[:2] == [[0, 2, 4], [1, 3, 5]] and asked.clusters()[1] == [6, 7, 8, 9]
    everyone = asked_of(everyone=True)
    assert everyone.groups[-1] == (7,) and everyone.prompts[7] == "zebra"


def test_a_limit_takes_whole_groups():
    chosen = {asked_of(limit=5, seed=seed).prompts for seed in range(8)}
    assert chosen <= {tuple(parts.PROMPTS[:5]), tuple(parts.PROMPTS[:3] + parts.PROMPTS[5:7]), tuple(parts.PROMPTS[3:7])}
    assert len(chosen) > 1


def test_one_group_is_not_enough():
    with pytest.raises(InputError, match="2 of 3 prompts have a neighbour .* fewer than two are evaluated"):
        asked_of(["a red cat", "a red car", "zebra"])


def test_repeated_prompts_count_once(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a\nb\na\n")
    source = read_source(str(file), False)
    assert source.prompts.prompts == ("a", "b") and source.repeated == 1


def test_seeds_do_not_depend_on_the_method_or_the_other_prompts():
    asked, fewer = asked_of(), asked_of(parts.PROMPTS[3:7])
    assert asked.seeds[1] == leaf_seed(0, "a red cat", 1)
    assert asked.seeds[6:] == fewer.seeds
    plans = plans_of(asked, Method("independent", 4), Method("independent", 9), Method("share", 4, value=0.5), Method("tree", 4, value=0.8))
    assert {tuple(leaf.seed for leaf in plan.leaves) for plan in plans.values()} == {asked.seeds}


def test_a_line_may_bring_its_seed(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f'{{"prompt": "{prompt}", "seed": {number}}}\n' for number, prompt in enumerate(parts.PROMPTS)))
    asked = ask(read_source(str(file), False), images=2, seed=0, similarity=0.6, max_group_size=8, limit=None, everyone=False)
    assert asked.seeds[:6] == (0, 1, 1, 2, 2, 3)


# ---- plans


def test_trees_stay_inside_the_groups():
    asked = asked_of()
    for budget in (0.9, 0.8, 0.7):
        plan = Method("tree", 20, value=budget).plan(asked)
        assert plan.cost(20).nfe <= budget * 20 * asked.pictures
        assert all(any(set(root.members) <= set(members) for members in asked.sets()) for root in plan.roots)


def test_every_method_is_there_once():
    request = Request(out="x")
    made = methods_at(12, request, "ddim", None, has_cache=True)
    assert {method.kind for method in made} == {"independent", *METHODS} - {"fewer-steps"}
    keys = [method.key for steps in (12, 30) for solver in ("ddim", "") for method in methods_at(steps, request, solver, None, True)]
    assert len(set(keys)) == len(keys)
    assert [method.steps for method in grid(request, "")] == [30, 25, 20, 15, 12, 10, 8, 6, 5, 4]


@pytest.mark.parametrize(("given", "counts"), [(None, (8,)), ((0,), ()), ((6, 12, 6), (12, 6))])
def test_comfortable_step_counts_are_drawn_independently_too(given, counts):
    request = Request(out="x", steps=(8, 4), comfortable=given)
    assert request.more_counts == counts and request.settings()["comfortable"] == list(counts)
    assert [method.steps for method in grid(request, "")] == sorted({8, 4, *counts}, reverse=True)


def test_what_draws_the_same_is_drawn_once():
    said = []
    asked = asked_of()
    methods = [Method("independent", 4), *(Method("share", 4, value=share) for share in (0.1, 0.2, 0.3, 0.5)),
               Method("step-back", 4, value=0.2), Method("tree", 4, value=0.2)]
    kept = planned(methods, asked, lambda method: method.steps, said.append)
    assert [method.label for method in kept] == ["independent", "share 0.2", "share 0.5"]
    assert any("share 0.1" in text and "the same as independent" in text for text in said)
    assert any("share 0.3" in text and "the same as share 0.2" in text for text in said)
    assert any("a step back" in text and "takes all that sharing saves" in text for text in said)
    assert any("budget must be at least" in text for text in said)


def test_rivals_have_the_nearest_rows():
    """Groups of 3, 2 and 2: a share of one half saves 4/14 · 1/2 · 2 of the rows, so 20 steps cost as many rows as 14.3."""
    asked = asked_of()
    plans = plans_of(asked, Method("share", 20, value=0.5), Method("share", 20, value=0.1), Method("shared-noise", 20))
    assert plans[Method("share", 20, value=0.5)].cost(20).saving == pytest.approx(0.5 * 4 / 7)
    assert rivals(plans, {}) == [Method("independent", 14), Method("independent", 19)]


def test_rivals_have_the_adapter_and_caches_have_rivals_once_they_are_drawn():
    style = Adapter("style", Path("style.safetensors"))
    plans = plans_of(asked_of(), Method("share", 20, "ddim", 0.5, style), Method("cache", 20, "ddim", 0.1))
    computed = {Method("cache", 20, "ddim", 0.1, style): 0.55}
    assert rivals(plans, computed) == [Method("independent", 14, "ddim", None, style), Method("independent", 11, "ddim", None, style)]


# ---- drawing


def test_an_independent_picture_is_the_pipelines_own(pipe, tmp_path):
    asked, method = asked_of(), Method("independent", STEPS)
    runner = draw(pipe, plans_of(asked, method), asked, tmp_path)
    options = dict(num_inference_steps=STEPS, guidance_scale=3.0)
    stock = [np.array(pipe(prompt, generator=torch.Generator().manual_seed(seed), **options).images[0]).astype(int)
             for prompt, seed in zip(asked.picture_prompts, asked.seeds)]
    assert worst(drawn(runner, method), stock) <= 1
    assert worst(drawn(runner, method)[1:], stock[:-1]) > 1
    assert totals(costs(runner.folder, method))["nfe"] == STEPS * asked.pictures


def test_shared_noise_is_the_medoids(pipe, tmp_path):
    asked, method = asked_of(images=1), Method("shared-noise", STEPS)
    runner = draw(pipe, plans_of(asked, method), asked, tmp_path)
    noise = [asked.seeds[medoid] for group, medoid in zip(asked.groups, asked.medoids) for _ in group]
    options = dict(num_inference_steps=STEPS, guidance_scale=3.0)
    stock = [np.array(pipe(prompt, generator=torch.Generator().manual_seed(seed), **options).images[0]).astype(int)
             for prompt, seed in zip(asked.prompts, noise)]
    assert worst(drawn(runner, method), stock) <= 1
    assert totals(costs(runner.folder, method))["nfe"] == STEPS * asked.pictures


def test_methods_take_turns(pipe, tmp_path, monkeypatch):
    """Chunk after chunk over all methods, and each chunk is of whole groups."""
    monkeypatch.setattr("sage.evaluation.runner.LEAST_CHUNKS", 99)
    asked = asked_of(images=6)
    methods = [Method("independent", 2), Method("share", 2, value=0.5)]
    order = []
    monkeypatch.setattr(Runner, "_draw_chunk", lambda self, method, plan, pictures, *rest: order.append((method.kind, pictures.tolist())))
    draw(pipe, plans_of(asked, *methods), asked, tmp_path)
    assert [kind for kind, _ in order] == ["independent", "share"] * 3
    assert [pictures for _, pictures in order[::2]] == asked.clusters()


def test_a_reference_is_drawn_again_for_the_clock_alone(pipe, tmp_path):
    """Where another method is drawn, and nowhere else: not for nothing, not twice in a run."""
    asked, method, other = asked_of(), Method("independent", 2), Method("share", 2, value=0.5)
    runner = draw(pipe, plans_of(asked, method), asked, tmp_path)
    before = parts.pictures(tmp_path)
    lines = lambda: [(row["phase"], row["run"]) for row in calls(runner.folder, method)]
    runner.draw(plans_of(asked, method), "methods", again=[method])
    assert lines() == [("grid", "now")]
    runner.draw(plans_of(asked, method, other), "methods", again=[method])
    assert before.items() <= parts.pictures(tmp_path).items() and lines() == [("grid", "now"), ("methods", "now")]
    assert totals(costs(runner.folder, method))["pictures"] == asked.pictures
    runner.draw(plans_of(asked, method, other), "methods", again=[method])
    assert len(lines()) == 2
    later = Runner(pipe, asked, runner.folder, guidance_scale=3.0, max_rows=64, run="later", say=print, progress=False)
    later.draw(plans_of(asked, method, other, Method("shared-noise", 2)), "methods", again=[method])
    assert lines()[2:] == [("methods", "later")] and len(calls(runner.folder, other)) == 1


def test_a_step_back_that_a_solver_has_no_form_for_is_said(pipe, tmp_path):
    asked = asked_of()
    method = Method("step-back", STEPS, "heun", 0.5)
    runner = draw(pipe, plans_of(asked, method, Method("independent", STEPS, "heun")), asked, tmp_path)
    assert "branch_back" in runner.unavailable[method] and len(runner.unavailable) == 1


@pytest.mark.parametrize("change", ["vae", "text_encoder", "buffer", "scheduler"])
def test_a_pipeline_is_known_by_all_that_draws(change):
    identity = pipeline_identity(tiny.stable_diffusion())
    assert pipeline_identity(tiny.stable_diffusion()) == identity
    other = tiny.stable_diffusion()
    if change == "scheduler":
        other.scheduler = type(other.scheduler).from_config(other.scheduler.config, beta_end=0.5)
    elif change == "buffer":
        other.unet.register_buffer("more", torch.ones(1))
    else:
        weight = next(getattr(other, change).parameters())
        weight.data[(0,) * weight.ndim] += 1e-6
    assert pipeline_identity(other) != identity


# ---- adapters and caches


def test_an_adapter_changes_the_pictures_and_is_gone_after_it(pipe, tmp_path):
    adapter = Adapter.at(str(parts.lora(pipe, tmp_path / "lora")))
    asked = asked_of(images=1)
    plain, tuned = Method("independent", STEPS), Method("independent", STEPS, adapter=adapter)
    runner = draw(pipe, plans_of(asked, tuned, plain), asked, tmp_path / "out")
    assert worst(drawn(runner, plain), drawn(runner, tuned)) > 10
    with adapted(pipe, adapter):
        options = dict(num_inference_steps=STEPS, guidance_scale=3.0)
        by_hand = [np.array(pipe(prompt, generator=torch.Generator().manual_seed(seed), **options).images[0])
                   for prompt, seed in zip(asked.prompts, asked.seeds)]
    assert worst(drawn(runner, tuned), [image.astype(int) for image in by_hand]) <= 1
    fresh = draw(tiny.stable_diffusion(), plans_of(asked, plain), asked, tmp_path / "fresh")
    assert worst(drawn(runner, plain), drawn(fresh, plain)) == 0
    assert tuned.key == f"{plain.key}--lora" and not any("lora" in name for name, _ in pipe.unet.named_parameters())


def test_a_file_that_is_no_lora_of_the_model_is_refused(pipe, tmp_path):
    from safetensors.torch import save_file

    save_file({"something": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="--adapter .*other.safetensors: cannot be loaded"):
        check_adapters(pipe, [Adapter.at(str(tmp_path / "other.safetensors"))])


def test_a_unet_has_no_cache(pipe):
    assert cache_refusal(pipe) == "none for this denoiser (UNet2DConditionModel has no cache in diffusers)"


def test_a_transformers_cache_is_counted_and_switched_off(tmp_path):
    pipe = native_cases.flux()
    pipe.set_progress_bar_config(disable=True)
    assert cache_refusal(pipe) is None
    asked = asked_of(["a red cat", "a red car", "an old house", "an old horse"], images=1)
    plain, always = Method("independent", STEPS), Method("cache", STEPS, value=1e6)
    runner = draw(pipe, plans_of(asked, always, plain), asked, tmp_path)
    assert not runner.unavailable
    assert totals(costs(runner.folder, plain))["computed"] == 1
    assert 0 < totals(costs(runner.folder, always))["computed"] < 0.8
    assert worst(drawn(runner, plain), drawn(runner, always)) > 0
    computed = Evaluation._computed(SimpleNamespace(folder=runner.folder), {always: None, plain: None}, runner)
    assert computed == {always: totals(costs(runner.folder, always))["computed"]}
    assert rivals({}, computed) == [Method("independent", round(computed[always] * STEPS))]
    with cached(pipe, 0.1):
        assert pipe.transformer.is_cache_enabled
    assert not pipe.transformer.is_cache_enabled
