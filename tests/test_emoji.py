"""The embedded model as it ships, and the chain that builds it."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import sage
import sage.emoji
from sage.emoji import checkpoint, data, evaluate, export, recipe, scenes, train
from sage.emoji.codec import PatchCodec, psnr

SHIPPED = sage.emoji._WEIGHTS
# Far apart in meaning, so that a picture which is taken for another's is wrong and not merely near.
CAPTIONS = ["a red apple on a green background", "a fox on a blue background", "a rocket on a purple background",
            "a flag of Japan on a gray background", "a snowman on a pink background", "a guitar on an orange background",
            "a blue heart on a yellow background", "a pizza on a green background"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Pictures this small gain nothing from a second thread, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pipe():
    pipe = sage.emoji.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def scorer():
    return sage.emoji.load_scorer()


def sentences(texts):
    """[N, 256] of norm 1, what prompts are grouped by."""
    return torch.from_numpy(sage.embed_prompts(texts).vectors)


def drawn(pipe, prompts, seed=0, **kwargs):
    """[N, 32, 32, 3] float32 in [0, 1]."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    settings = {"num_inference_steps": 12, "guidance_scale": sage.emoji.GUIDANCE_SCALE} | kwargs
    return pipe(prompts, generator=generators, output_type="np", **settings).images


def as_tensor(images):
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2) * 2 - 1


# The shipped folder.


def test_loads_with_plain_diffusers_and_no_network():
    code = (
        "import socket\n"
        "def refuse(*args): raise AssertionError('reached for the network')\n"
        "socket.socket.connect = refuse\n"
        "import sys; from diffusers import StableDiffusionPipeline\n"
        "pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1])\n"
        "assert next(pipe.unet.parameters()).dtype.is_floating_point and 'sage' not in sys.modules\n"
        "image = pipe('red apple', num_inference_steps=2, guidance_scale=2.0).images[0]\n"
        "print(type(pipe).__name__, image.size)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(sage.emoji.model_path())], capture_output=True, text=True,
                          env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}, cwd=SHIPPED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "StableDiffusionPipeline (32, 32)"


def test_importing_the_module_is_cheap():
    code = "import sage.emoji, sys; print(sorted({'diffusers', 'transformers', 'tokenizers', 'PIL'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_folder_is_small_and_holds_no_pickle():
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ".png", ".webp", ".txt"}
    for path in SHIPPED.rglob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert torch.isfinite(tensor.float()).all(), f"{path.name}: {name}"


def test_card_states_what_metrics_json_holds():
    metrics = json.loads((SHIPPED / "metrics.json").read_text())
    assert (SHIPPED / "README.md").read_text() == export.card(metrics)
    changed = json.loads(json.dumps(metrics))
    changed["benchmark"]["trained"]["drawn"]["identification"]["value"] += 0.1
    assert (SHIPPED / "README.md").read_text() != export.card(changed)


def test_shipped_weights_come_from_the_recipe_in_the_source():
    training = json.loads((SHIPPED / "metrics.json").read_text())["training"]
    for name, run in training.items():
        now = json.loads(json.dumps(dataclasses.asdict(getattr(recipe.full(), name))))
        assert run["recipe"] == now, name
        assert run["steps"] == now["steps"], name


def test_missing_weights_name_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(sage.emoji, "_WEIGHTS", tmp_path)
    for path in (sage.emoji.model_path, sage.emoji.text_encoder_path, sage.emoji.scorer_path):
        with pytest.raises(RuntimeError, match="python -m sage.emoji.build"):
            path()


# What it draws.


def test_same_seed_same_pixels_other_seed_other_pixels(pipe):
    first, again, other = (drawn(pipe, ["red apple"], seed=s, num_inference_steps=4) for s in (3, 3, 4))
    assert first.shape == (1, 32, 32, 3)
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_the_card_says_whether_the_gate_is_met():
    metrics = json.loads((SHIPPED / "metrics.json").read_text())
    good = {name: {"wanted": 0.7, "found": 0.8, "met": True} for name in evaluate.GATE}
    assert "The gate is met." in export.card(metrics | {"gate": good})
    bad = good | {"diversity_ratio": {"wanted": 0.9, "found": 0.5, "met": False}}
    assert "The gate is not met" in export.card(metrics | {"gate": bad}) and "**missed**" in export.card(metrics | {"gate": bad})


def test_blind_answers_count_for_the_weights_they_were_given_on_only(tmp_path):
    (tmp_path / "unet").mkdir()
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"one")
    told = {"unet_sha256": evaluate.unet_digest(tmp_path), "judge": "somebody", "pictures": [{"right": True}, {"right": False}]}
    (tmp_path / "blind.json").write_text(json.dumps(told))
    assert evaluate.blind_score(tmp_path) == {"right": 1, "of": 2, "judge": "somebody"}
    weights.write_bytes(b"other")
    assert evaluate.blind_score(tmp_path) is None


def test_pictures_are_recognised_by_the_scorer(pipe, scorer):
    texts = scorer.embed_texts(CAPTIONS)
    similarity = scorer.embed_images(as_tensor(drawn(pipe, CAPTIONS))) @ texts.T
    right = (similarity.argmax(1) == torch.arange(len(CAPTIONS))).sum()
    assert right >= 7  # chance is 1 of 8
    generator = torch.Generator().manual_seed(0)
    noise = scorer.embed_images(torch.rand(8, 3, 32, 32, generator=generator) * 2 - 1) @ texts.T
    assert similarity.diagonal().mean() > noise.diagonal().mean() + 0.2


@pytest.mark.parametrize("solver", ["DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler"])
def test_other_solvers_draw_the_same_things(pipe, scorer, solver):
    import diffusers

    ours = pipe.scheduler
    try:
        pipe.scheduler = getattr(diffusers, solver).from_config(ours.config)
        images = drawn(pipe, CAPTIONS, num_inference_steps=15)
    finally:
        pipe.scheduler = ours
    similarity = scorer.embed_images(as_tensor(images)) @ scorer.embed_texts(CAPTIONS).T
    assert (similarity.argmax(1) == torch.arange(len(CAPTIONS))).sum() >= 7


def test_caption_decides_the_picture(pipe):
    """One noise, two captions: the pictures differ in colour as the captions do."""
    apple, heart = (drawn(pipe, [prompt], seed=0)[0] for prompt in ("red apple", "blue heart"))
    reddish = lambda image: float((image[..., 0] - image[..., 2]).mean())
    assert reddish(apple) > 0.1 and reddish(heart) < -0.1


def test_autoencoder_reads_what_it_writes(pipe):
    images = as_tensor(drawn(pipe, CAPTIONS[:4]))
    with torch.no_grad():
        again = pipe.vae.decode(pipe.vae.encode(images).latent_dist.mode()).sample
    assert psnr(again.clamp(-1, 1), images) > 22


# The text encoder.


def test_text_encoder_embeds_by_meaning():
    e = sentences(["grinning cat", "smiling kitten", "cargo ship", "a photo of a dog on a beach",
                            "a picture of a puppy by the sea"])
    assert torch.allclose(e.norm(dim=1), torch.ones(5), atol=1e-5)
    assert e[0] @ e[1] > e[0] @ e[2] + 0.2
    assert e[3] @ e[4] > 0.6 > e[3] @ e[2]


def test_demo_prompts_form_groups_and_leave_loners():
    prompts = (Path(__file__).parents[1] / "examples" / "prompts.txt").read_text(encoding="utf8").splitlines()
    assert len(prompts) >= 48 and len(set(prompts)) == len(prompts)
    sizes = [len(group) for group in sage.group(sentences(prompts).numpy(), prompts)]
    assert sum(size >= 3 for size in sizes) >= 10
    assert sizes.count(1) >= 4


def test_text_encoder_folder_reads_64_tokens_and_splits_unknown_words():
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sage.emoji.text_encoder_path(), local_files_only=True)
    model = AutoModel.from_pretrained(sage.emoji.text_encoder_path(), local_files_only=True)
    assert tokenizer.model_max_length == 64 and model.config.use_attention_mask
    assert next(model.parameters()).dtype == torch.float32
    inputs = tokenizer(["word " * 100, "xqzvy florbish 3.14!"], padding=True, truncation=True, return_tensors="pt")
    assert inputs["input_ids"].shape == (2, 64)
    assert tokenizer.unk_token_id not in inputs["input_ids"]
    assert torch.isfinite(model(**inputs).last_hidden_state).all()


def test_pipeline_masks_padding(pipe):
    """A prompt's states must not depend on what stands after it in the padding."""
    tokens = pipe.tokenizer("red apple", padding="max_length", return_tensors="pt")
    assert tokens["input_ids"].shape == (1, 24)
    with torch.no_grad():
        masked = pipe.text_encoder(tokens["input_ids"], attention_mask=tokens["attention_mask"])[0]
        embedded, _ = pipe.encode_prompt("red apple", "cpu", 1, False)
    assert torch.equal(masked, embedded)


# The pieces of the build.


def test_captions_read_as_phrases():
    name = lambda text: data.Emoji((0x1F600,), text, "", "").caption
    assert name("flag: Peru") == "flag of Peru"
    assert name("man: beard") == "man with beard"
    assert name("woman: dark skin tone, red hair") == "woman with dark skin tone and red hair"
    assert name("keycap: 3") == "keycap 3"
    assert name("red apple") == "red apple"


def test_patch_codec_is_exact_on_its_own_subspace():
    generator = torch.Generator().manual_seed(0)
    codec = PatchCodec.fit(torch.rand(64, 3, 32, 32, generator=generator) - 0.5)
    latents = codec.encode(torch.rand(4, 3, 32, 32, generator=generator) - 0.5) * 0.2
    assert latents.shape == (4, 16, 8, 8)
    assert torch.allclose(codec.encode(codec.decode(latents)), latents, atol=1e-4)


def test_agreement_with_itself_is_whole_and_with_noise_is_not():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(10, 32, generator=generator).repeat_interleave(4, 0)
    near = torch.nn.functional.normalize(centres + 0.3 * torch.randn(40, 32, generator=generator), dim=1)
    same = evaluate.evaluate_text(near, near, "itself")
    assert same["spearman"] == same["pair_f1"] == same["same_group"] == 1.0
    other = torch.nn.functional.normalize(torch.randn(40, 32, generator=generator), dim=1)
    assert evaluate.evaluate_text(other, near, "noise")["spearman"] < 0.2


def test_a_batch_in_parts_has_the_gradients_of_the_whole():
    plan = dataclasses.replace(recipe.quick().unet, channels=(32, 64))
    draw = lambda *shape: torch.randn(shape, generator=generator)
    losses, gradients = [], []
    for parts in (1, 3):
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        model = train.build_unet(plan, 256)
        batch = draw(7, 16, 8, 8), torch.arange(7) * 100, draw(7, 24, 256), draw(7, 16, 8, 8)
        losses.append(train.Shards(model, parts).backward(*batch))
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
    assert torch.allclose(*losses, rtol=1e-5)
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm() and gradients[0].norm() > 0


def test_scenes_come_with_the_states_of_their_captions():
    """Every caption's states hold its number; its pictures must be the ones that come with it."""
    names = ["red apple", "skull"]
    composer, codec = sage.emoji.load_composer(), PatchCodec.fit(sage.emoji.real_pictures(sage.emoji.benchmark()[:60]).float() / 127.5 - 1)
    stills = [scenes.Scene((name,), still=True) for name in names * 3]
    states = torch.arange(2.0).half()[:, None, None].expand(2, 24, 8)
    latents, found = train.SceneSource(stills, states, composer, codec).draw(40, torch.Generator().manual_seed(0))
    assert latents.shape == (40, 16, 8, 8) and found.shape == (40, 24, 8) and found.dtype == torch.float32
    wanted = codec.encode(composer(stills[:2], torch.Generator()))
    assert {int(x) for x in found[:, 0, 0]} == {0, 1}
    for x, number in zip(latents, found[:, 0, 0].int().tolist()):
        assert torch.equal(x, wanted[number])
    with pytest.raises(ValueError, match="one for each of 2 captions, got 1"):
        train.SceneSource(stills, states[:1], composer, codec)


def _train(path, steps, stop=None):
    """A toy training whose result depends on weights, moments and random state alike; `stop` interrupts it."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    run = checkpoint.Run(path, "toy", recipe.ScorerRecipe(steps=steps), {"model": model}, optimizer, generator, save_every=2)
    for step in run:
        if step == stop:
            return model
        loss = model(torch.randn(5, 3, generator=generator)).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.log(loss)
    return model


def test_interrupted_training_ends_where_an_uninterrupted_one_does(tmp_path):
    whole = _train(tmp_path / "whole.safetensors", 9)
    stopped = _train(tmp_path / "parts.safetensors", 9, stop=5)
    assert not torch.equal(stopped.weight, whole.weight)
    resumed = _train(tmp_path / "parts.safetensors", 9)
    assert torch.equal(resumed.weight, whole.weight) and torch.equal(resumed.bias, whole.bias)
    assert checkpoint.summary(tmp_path / "parts.safetensors")["steps"] == 9


def test_checkpoint_of_another_recipe_is_refused(tmp_path):
    _train(tmp_path / "toy.safetensors", 4)
    with pytest.raises(ValueError, match="another recipe"):
        _train(tmp_path / "toy.safetensors", 6)


@pytest.mark.deep
def test_whole_chain(tmp_path):
    """Every stage in miniature; the folder that comes out loads and draws."""
    try:
        from sage.emoji import corpus, distill

        data.load_font()
        data.parse_names()
        corpus.wordnet()
        distill.teacher_folder()
    except RuntimeError as missing:
        pytest.skip(f"building needs what is not here: {missing}")
    out = tmp_path / "toy"
    command = [sys.executable, "-m", "sage.emoji.build", "--quick", "--out", str(out), "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (out / "README.md").read_text() == export.card(json.loads((out / "metrics.json").read_text()))
    from diffusers import StableDiffusionPipeline

    toy = StableDiffusionPipeline.from_pretrained(out, local_files_only=True)
    assert drawn(toy, ["red apple"], num_inference_steps=2).shape == (1, 32, 32, 3)
    again = subprocess.run(command + ["--stage", "unet"], capture_output=True, text=True)
    assert again.returncode == 0 and "4/4" in again.stderr  # nothing left to do
