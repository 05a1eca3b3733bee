"""sage.generate: prompts in, pictures out, each with its record."""

import numpy as np
import pytest
import torch
from tiny import PROMPTS, stable_diffusion

import sage
from sage import Leaf, Node, SharingPlan
from sage.embed import Embeddings
from sage.native import NotNative
from sage.seeds import leaf_seed

STEPS = 4
# Two alike, two alike, one on its own.
VECTORS = {
    "a red cat": (1.0, 0.0, 0.0),
    "a blue cat": (0.9, 0.1, 0.0),
    "a green cat": (0.8, 0.0, 0.3),
    "a red car": (0.0, 1.0, 0.1),
    "an old house by the sea": (0.0, 0.0, 1.0),
}


@pytest.fixture(scope="module")
def stock():
    return stable_diffusion()


@pytest.fixture
def pipe(stock, monkeypatch):
    """The tiny pipeline, with prompts embedded by hand."""

    def embed(prompts, encoder="auto", pipe=None, **kwargs):
        vectors = np.array([VECTORS[prompt] for prompt in prompts], dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return Embeddings(vectors, "by hand", np.zeros(len(prompts), dtype=bool))

    monkeypatch.setattr("sage.generation.embed_prompts", embed)
    monkeypatch.setattr("sage.sharing.embed_prompts", embed)
    return stock


def make(pipe, prompts=PROMPTS, **kwargs):
    options = dict(num_inference_steps=STEPS, guidance_scale=3.0, output_type="np", progress=False, share=0.5) | kwargs
    return sage.generate(pipe, prompts, **options)


def close(a, b):
    return np.abs(np.asarray(a) - np.asarray(b)).max() <= 1e-4  # pixels in [0, 1], after the decoder


def test_images_and_records_come_in_the_order_asked_for(pipe):
    result = make(pipe)
    assert len(result.images) == len(result.records) == len(PROMPTS)
    assert [record["prompt"] for record in result.records] == PROMPTS
    assert [record["index"] for record in result.records] == list(range(len(PROMPTS)))
    groups = {frozenset(r["prompt"] for r in result.records if r["group"] == g) for g in {r["group"] for r in result.records}}
    assert groups == {
        frozenset({"a red cat", "a blue cat", "a green cat"}),
        frozenset({"a red car"}),
        frozenset({"an old house by the sea"}),
    }
    cats = [record for record in result.records if record["group_size"] == 3]
    assert {record["trunk_prompt"] for record in cats} == {"a red cat"}  # the medoid
    assert {record["branch_call"] for record in cats} == {2}
    loners = [record for record in result.records if record["group_size"] == 1]
    assert all(record["branch_call"] == 0 and record["similarity_to_trunk"] == pytest.approx(1) for record in loners)
    assert result.stats["rows"] == [3, 3, 5, 5] and result.stats["nfe"] == 16
    assert result.stats["saving"] == pytest.approx(0.2)
    assert result.stats["encoder"] == "by hand" and result.stats["solver_path"] == "table"


def test_without_sharing_each_picture_is_stocks_with_its_seed(pipe):
    result = make(pipe, share=0.0)
    for image, record in zip(result.images, result.records):
        generator = torch.Generator().manual_seed(record["seed"])
        alone = pipe(record["prompt"], generator=generator, num_inference_steps=STEPS, guidance_scale=3.0, output_type="np")
        assert close(image, alone.images[0])


def test_seeds_belong_to_prompts_and_not_to_places(pipe):
    first, second = make(pipe), make(pipe, PROMPTS[::-1])
    seeds = {record["prompt"]: record["seed"] for record in first.records}
    assert seeds == {record["prompt"]: record["seed"] for record in second.records}
    for image, record in zip(first.images, first.records):
        assert close(image, second.images[len(PROMPTS) - 1 - record["index"]])
    assert seeds["a red cat"] == leaf_seed(0, "a red cat", 0)
    assert {record["seed"] for record in make(pipe, seed=1).records}.isdisjoint(seeds.values())


def test_a_seed_is_the_same_on_every_machine():
    assert leaf_seed(0, "a red cat", 0) == 5962989381903822094
    assert leaf_seed(0, "a red cat", 1) != leaf_seed(0, "a red cat", 0) != leaf_seed(1, "a red cat", 0)


def test_packing_changes_nothing(pipe):
    together, apart = make(pipe, max_rows=None), make(pipe, max_rows=4)
    assert (together.stats["packs"], apart.stats["packs"]) == (1, 2)  # three groups: two rows with two copies, and one
    assert together.stats["nfe"] == apart.stats["nfe"] and together.stats["rows"] == apart.stats["rows"]
    assert all(close(a, b) for a, b in zip(together.images, apart.images))
    assert all(close(a, b) for a, b in zip(together.images, make(pipe, max_rows=2).images))


def test_the_denoiser_is_full_in_the_trunk_and_in_the_branches(pipe, monkeypatch):
    """40 prompts in 8 groups of 5: as many groups as fill it go into a call, and their members go through in pieces."""
    names = [f"group {number}" for number in range(8)]
    prompts = [f"{name}, variant {variant}" for name in names for variant in range(5)]
    plan = SharingPlan.flat([Leaf(p) for p in prompts], [range(5 * g, 5 * g + 5) for g in range(8)], 0.5)
    rows, pictures = [], []
    convolve, call = pipe.unet.conv_in.forward, pipe.scheduler.step
    monkeypatch.setattr(pipe.unet.conv_in, "forward", lambda x: rows.append(len(x)) or convolve(x))
    result = make(pipe, prompts, plan=plan, max_rows=8, on_images=lambda indices, images, records: pictures.append(len(indices)))
    assert pictures == [20, 20]  # four groups a call, whatever the number of prompts
    assert rows == 2 * ([8] * 2 + [8] * 10)
    assert result.stats["launches"] == len(rows) and sum(rows) == 2 * result.stats["nfe"]
    assert call == pipe.scheduler.step


def test_memory_that_runs_out_is_remembered(pipe, monkeypatch, caplog):
    expected = make(pipe, share=0.0)
    rows, convolve = [], pipe.unet.conv_in.forward

    def limited(x):
        if len(x) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        rows.append(len(x))
        return convolve(x)

    monkeypatch.setattr(pipe.unet.conv_in, "forward", limited)
    result = make(pipe, share=0.0, max_rows=8)  # five pictures: four in the first call
    assert all(close(a, b) for a, b in zip(result.images, expected.images))
    assert caplog.text.count("out of memory with 8 rows at once: going on with max_rows=4") == 1
    assert result.stats["max_rows"] == 4 and rows == [4, 4] * STEPS + [2] * STEPS


def test_repeated_prompts_and_images_per_prompt_get_pictures_of_their_own(pipe):
    result = make(pipe, ["a red cat", "a blue cat", "a red cat"])
    assert [record["image_index"] for record in result.records] == [0, 0, 1]
    assert not close(result.images[0], result.images[2])
    assert result.records[0]["group"] == result.records[1]["group"] != result.records[2]["group"]
    double = make(pipe, ["a red cat", "a blue cat"], images_per_prompt=2)
    assert [(r["prompt"], r["image_index"]) for r in double.records] == [
        ("a red cat", 0),
        ("a red cat", 1),
        ("a blue cat", 0),
        ("a blue cat", 1),
    ]
    assert double.records[0]["group"] == double.records[2]["group"] != double.records[1]["group"]
    assert close(double.images[0], result.images[0]) and not close(double.images[1], result.images[2])


def test_seeds_can_be_given(pipe):
    result = make(pipe, PROMPTS[:2], seeds=[7, 9], images_per_prompt=2)
    assert [record["seed"] for record in result.records] == [7, 8, 9, 10]


def test_a_plan_can_be_frozen_and_passed_in(pipe):
    first = make(pipe)
    again = make(pipe, plan=SharingPlan.from_json(first.plan.to_json()), seed=5)  # the plan brings its seeds
    assert all(close(a, b) for a, b in zip(first.images, again.images))
    assert [r["seed"] for r in again.records] == [r["seed"] for r in first.records]
    assert again.records[0]["similarity_to_trunk"] is None


def test_negative_prompts_go_with_their_prompts(pipe):
    one, many = make(pipe, negative_prompt="blurry"), make(pipe, negative_prompt=["blurry"] * 5)
    assert all(close(a, b) for a, b in zip(one.images, many.images))
    other = make(pipe, negative_prompt=["blurry", "blurry", "blurry", "dark", "blurry"])
    assert not close(other.images[3], one.images[3]) and close(other.images[1], one.images[1])
    assert other.records[3]["negative_prompt"] == "dark"


def test_a_solver_can_be_chosen_and_the_pipeline_is_left_as_it_was(pipe):
    scheduler, bar, cls = pipe.scheduler, dict(pipe._progress_bar_config), type(pipe)
    result = make(pipe, solver="dpm++2m")
    assert result.stats["solver"] == "dpm++2m"
    assert pipe.scheduler is scheduler and pipe._progress_bar_config == bar and type(pipe) is cls
    assert pipe.vae.use_slicing is False
    assert not close(result.images[0], make(pipe).images[0])


def test_records_say_when_a_solver_of_two_stages_really_branched(pipe):
    """Heun's groups part between whole steps: later than the share alone would say."""
    result = make(pipe, solver="heun", share=0.45)  # floor(0.45 · 7 + 0.5) = 3 lies inside the second step
    cats = [record for record in result.records if record["group_size"] == 3]
    assert result.stats["rows"] == [3, 3, 3, 3, 5, 5, 5] and result.stats["boundaries"] is not None
    assert {record["branch_call"] for record in cats} == {4}


def test_records_of_a_group_that_shared_nothing_name_the_picture_itself(pipe):
    for record in make(pipe, share=0.0).records:
        assert record["branch_call"] == 0 and record["trunk_seed"] == record["seed"]
        assert record["trunk_prompt"] == record["prompt"] and record["similarity_to_trunk"] == 1


def test_an_enabled_pipeline_stays_enabled(pipe):
    sharing = sage.enable(pipe, share=0.25)
    try:
        make(pipe)
        pipe(["a red cat", "a blue cat"], num_inference_steps=STEPS, output_type="latent")
        assert sharing.stats["rows"] == [1, 2, 2, 2]
    finally:
        sage.disable(pipe)


def test_a_fresh_pipeline_without_a_progress_bar_setting(pipe):
    bar = pipe.__dict__.pop("_progress_bar_config")
    try:
        with pytest.raises(ValueError, match="unknown solver 'nope'"):
            make(pipe, solver="nope")
        make(pipe)
        assert "_progress_bar_config" not in pipe.__dict__
    finally:
        pipe._progress_bar_config = bar


def test_the_pipeline_is_left_as_it_was_after_a_failure(pipe):
    scheduler, cls = pipe.scheduler, type(pipe)
    with pytest.raises(RuntimeError, match="disk full"):
        make(pipe, solver="unipc", on_images=lambda *args: (_ for _ in ()).throw(RuntimeError("disk full")))
    assert pipe.scheduler is scheduler and type(pipe) is cls and pipe.vae.use_slicing is False


def test_pictures_are_handed_over_as_packs_finish(pipe):
    seen = []
    result = make(pipe, max_rows=4, on_images=lambda indices, images, records: seen.append((indices, images, records)))
    assert sorted(i for indices, _, _ in seen for i in indices) == list(range(len(PROMPTS))) and len(seen) == 2
    for indices, images, records in seen:
        for i, image, record in zip(indices, images, records):
            assert record is result.records[i] and np.array_equal(image, result.images[i])


def test_the_progress_bar_counts_denoiser_rows(pipe, capsys):
    make(pipe, progress=True)
    assert "16/16" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(prompts=[]), ValueError, "prompts must hold at least one prompt"),
        (dict(prompts=["a red cat", 3]), TypeError, r"prompts\[1\] must be a str, got 3"),
        (dict(share=-0.1), ValueError, r"share must be in \[0, 1\], got -0.1"),
        (dict(similarity=2), ValueError, r"similarity must be in \(-1, 1\], got 2.0"),
        (dict(seeds=[1]), ValueError, "seeds must hold one seed per prompt, 5, got 1"),
        (dict(negative_prompt=["x"]), ValueError, "negative_prompt must be one for all or one per prompt, 5, got 1"),
        (dict(images_per_prompt=0), ValueError, "images_per_prompt must be at least 1, got 0"),
        (dict(prompts="a red cat"), TypeError, "prompts must be a sequence of str, got str"),
        (dict(max_rows=0), ValueError, "max_rows must be at least 1, got 0"),
        (dict(max_rows="a", plan=SharingPlan.independent([Leaf(p) for p in PROMPTS])), TypeError, "max_rows must be an integer"),
        (dict(share=7, plan=SharingPlan.independent([Leaf(p) for p in PROMPTS])), ValueError, r"share must be in \[0, 1\]"),
        (dict(plan=3), TypeError, "plan must be a sage.SharingPlan or None, got int"),
        (dict(seed=1.5), TypeError, "seed must be an integer, got 1.5"),
        (dict(seeds=7), TypeError, "seeds must be a sequence of integers, one per prompt, got int"),
        (dict(negative_prompt=5), TypeError, "negative_prompt must be a sequence of str, got int"),
        (dict(guidance_scale=float("nan")), ValueError, "guidance_scale must be a finite number, got nan"),
        (dict(guidance_scale="7"), ValueError, "guidance_scale must be a finite number, got '7'"),
        (dict(num_inference_steps=0), ValueError, "num_inference_steps must be at least 1, got 0"),
        (dict(num_inference_steps="4"), TypeError, "num_inference_steps must be an integer, got '4'"),
        (dict(on_images=3), TypeError, "on_images must be callable, got int"),
        (dict(num_videos_per_prompt=2), ValueError, "num_videos_per_prompt cannot be passed to sage.generate: use images_per_prompt"),
        (dict(max_rows=2.5), TypeError, "max_rows must be an integer, got 2.5"),
        (dict(share="0.4"), TypeError, r"share must be a number in \[0, 1\], got '0.4'"),
        (dict(negative_prompt=[None] * 5), TypeError, r"negative_prompt\[0\] must be a str, got None"),
        (dict(latents=torch.zeros(5, 4, 8, 8)), ValueError, "latents cannot be passed to sage.generate: each picture's come"),
        (dict(generator=torch.Generator()), ValueError, "generator cannot be passed to sage.generate: use seed or seeds"),
        (dict(stepz=3), TypeError, "stepz is an argument neither of sage.generate nor one that the call of StableDiffusionPipeline names"),
        (dict(solver="nope"), ValueError, "unknown solver 'nope'; known: ddim"),
        (dict(plan=SharingPlan.independent([Leaf("a red cat")])), ValueError, "plan is for 1 pictures, but the call asks for 5"),
    ],
)
def test_bad_arguments_are_refused_before_the_denoiser_runs(pipe, monkeypatch, change, error, message):
    monkeypatch.setattr(pipe.unet.conv_in, "forward", lambda x: pytest.fail("the denoiser ran"))
    with pytest.raises(error, match=message):
        make(pipe, **change)


def test_generate_wants_a_pipeline():
    with pytest.raises(TypeError, match="pipe must be a diffusers pipeline, got dict"):
        sage.generate({}, ["a red cat"])


def test_enable_without_a_plan_plans_each_call(pipe):
    kwargs = dict(num_inference_steps=STEPS, output_type="latent", generator=[torch.Generator() for _ in range(3)])
    with sage.enable(pipe, share=0.5) as sharing:
        pipe(["a red cat", "a blue cat", "a red car"], **kwargs)
        assert sharing.stats["rows"] == [2, 2, 3, 3]
        kwargs["generator"] = [torch.Generator() for _ in range(2)]
        pipe(["a red car", "an old house by the sea"], **kwargs)
        assert sharing.stats["rows"] == [2, 2, 2, 2] and sharing.plan.encoder == "by hand"
        pipe("a red cat", num_images_per_prompt=2, **kwargs)
        assert sharing.stats["saving"] == 0
        with pytest.raises(ValueError, match="the call gives no prompt: there is no text to group by"):
            pipe(prompt_embeds=torch.zeros(2, 77, 32), negative_prompt_embeds=torch.zeros(2, 77, 32))


def test_records_name_the_noise_that_a_tree_really_began_with(pipe):
    """The root never runs as one row: each pair has its own trunk."""
    pairs = [Node((0, 1), 1, 0.5, (Node.single(0), Node.single(1))), Node((2, 3), 2, 0.5, (Node.single(2), Node.single(3)))]
    plan = SharingPlan.tree([Leaf(p) for p in PROMPTS], [Node((0, 1, 2, 3), 0, 0.0, tuple(pairs))])
    result = make(pipe, plan=plan)
    assert result.stats["rows"] == [3, 3, 5, 5]
    assert [record["trunk_prompt"] for record in result.records] == [PROMPTS[i] for i in (1, 1, 2, 2, 4)]
    assert [record["trunk_seed"] for record in result.records] == [result.records[i]["seed"] for i in (1, 1, 2, 2, 4)]


# ---- engines


@pytest.mark.parametrize("solver", ["dpm++2m", "euler-a"])
def test_both_engines_give_the_same_pictures(pipe, solver):
    native, hook, chosen = (make(pipe, engine=engine, solver=solver) for engine in ("native", "hook", "auto"))
    assert [result.stats["engine"] for result in (native, hook, chosen)] == ["native", "hook", "native"]
    assert all(close(a, b) for a, b in zip(native.images, hook.images))
    assert native.records == hook.records and native.stats["rows"] == hook.stats["rows"]


def test_what_the_native_loop_does_not_cover_goes_through_the_hook_and_says_so(pipe):
    result = make(pipe, cross_attention_kwargs={"scale": 0.5})
    assert result.stats["engine"] == "hook" and "the argument cross_attention_kwargs" in result.stats["engine_reason"]
    with pytest.raises(NotNative, match="the argument cross_attention_kwargs"):
        make(pipe, engine="native", cross_attention_kwargs={"scale": 0.5})
    with pytest.raises(ValueError, match="engine must be one of 'auto', 'native', 'hook', got 'fast'"):
        make(pipe, engine="fast")
