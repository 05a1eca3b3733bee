"""The training loop on tiny random models: against an ordinary loop, resumed, with every family, and what comes out of it."""

import json

import pytest
import test_training_families
import tiny
import torch
from accelerate.state import AcceleratorState
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_parts import GROUPS, options_for, read_log, write_pictures

import sage
from sage.adapters import AdapterSettings, adapter_file, read_adapter_settings, usual_share
from sage.prompts import InputError
from sage.training import checkpoint
from sage.training.adapter import adapter_off, attach_adapter, trainable
from sage.training.data import Transform, draw, read_training_set
from sage.training.families import FAMILIES, family_for
from sage.training.sampler import GroupBatchSampler
from sage.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

# Everything at once that has a state of its own.
FULL_STATE = {
    "consistency_weight": 0.5, "caption_dropout": 0.3, "share_jitter": 0.1, "snr_gamma": 5.0, "use_ema": True, "random_flip": True,
    "lr_scheduler": "cosine", "lr_warmup_steps": 1, "gradient_accumulation_steps": 2, "checkpointing_steps": 2, "share": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def trainer_of(out, data, pipe=None, groups=GROUPS, **options):
    pipe = tiny.stable_diffusion() if pipe is None else pipe
    return Trainer(family_for(pipe), read_training_set(data, progress=False), groups, options_for(out, data, **options), say=str, progress=False)


def train(*args, **options):
    trainer = trainer_of(*args, **options)
    trainer.run()
    return trainer


def adapter(out):
    return load_file(out / "pytorch_lora_weights.safetensors")


def assert_equal(first: dict, second: dict):
    assert first.keys() == second.keys() and first
    assert all(torch.equal(value, second[key]) for key, value in first.items())


class Killed(Exception):
    """In the place of a kill."""


def kill_after(trainer, step):
    log = trainer._log

    def logging(batch):
        log(batch)
        if trainer.step == step:
            raise Killed

    trainer._log = logging
    with pytest.raises(Killed):
        trainer.run()


# ---- against a loop that is written out


def test_without_sharing_it_is_an_ordinary_loop_bit_for_bit(tmp_path, data):
    train(tmp_path, data, soft_target="none", max_train_steps=3)
    pipe = tiny.stable_diffusion()
    for part in (pipe.vae, pipe.text_encoder):
        part.requires_grad_(False)
    attach_adapter(pipe.unet, ["to_k", "to_q", "to_v", "to_out.0"], rank=4)
    parameters = [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=1e-2)
    pictures, sampler, losses = read_training_set(data, progress=False), GroupBatchSampler(GROUPS, 4), []
    batches = [batch for _ in range(2) for batch in sampler][:3]
    for batch in batches:
        pixels = torch.stack([Transform(16)(pictures.picture(row), 0, batch.epoch, row) for row in batch.rows])
        with torch.no_grad():
            x = pipe.vae.encode(pixels).latent_dist.mode().contiguous() * pipe.vae.config.scaling_factor  # not channels last
            text = pipe.encode_prompt([pictures.captions[row] for row in batch.rows], "cpu", 1, False)[0]
        noise, t = [], []
        for number in dict.fromkeys(batch.groups):
            count, generator = batch.groups.count(number), torch.Generator().manual_seed(draw("step", 0, batch.epoch, number))
            torch.rand([], generator=generator, dtype=torch.float64)
            noise.append(torch.randn([count, *x.shape[1:]], generator=generator))
            first = draw("quantile", 0, batch.epoch) / 2**64 + number * 0.5698402909980532
            t += [int(1000 * ((first % 1 + i / count) % 1)) for i in range(count)]
        noise, t = torch.cat(noise), torch.tensor(t)
        alpha, sigma = (level.float().view(-1, 1, 1, 1) for level in
                        (pipe.scheduler.alphas_cumprod.double()[t].sqrt(), (1 - pipe.scheduler.alphas_cumprod.double()[t]).sqrt()))  # fmt: skip
        z = alpha * x + sigma * noise
        target = (alpha * z - x) / sigma
        assert torch.allclose(target, pipe.scheduler.get_velocity(x, noise, t), atol=1e-5)
        errors = (pipe.unet(z, t, text, return_dict=False)[0] - target).square().flatten(1).mean(1)
        loss = errors.sum() / len(batch.rows)
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert [line["loss"] for line in read_log(tmp_path)] == losses
    trained = checkpoint.load_tensors(tmp_path / "checkpoint-3", "trainable")
    assert_equal(trained, {key: value.detach() for key, value in pipe.unet.named_parameters() if value.requires_grad})
    assert trained["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.default.weight"].abs().max() > 1e-3


# ---- resuming


@pytest.fixture(scope="module")
def straight(tmp_path_factory, data):
    """A training of four steps that nothing interrupts."""
    out = tmp_path_factory.mktemp("straight")
    torch.set_num_threads(1)
    return out, train(out, data, **FULL_STATE)


def test_a_killed_training_goes_on_bit_for_bit(tmp_path, data, straight):
    out, _ = straight
    kill_after(trainer_of(tmp_path, data, **FULL_STATE), 3)
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2, 3]
    (tmp_path / ".checkpoint-4.part").mkdir()  # what a kill in the middle of writing leaves
    torch.manual_seed(99)
    said = []
    trainer = trainer_of(tmp_path, data, resume_from_checkpoint="latest", **FULL_STATE)
    trainer.say = said.append
    trainer.run()
    assert said == ["Going on from checkpoint-2, step 2 of 4."]
    assert read_log(tmp_path) == read_log(out) and [line["step"] for line in read_log(out)] == [1, 2, 3, 4]
    assert_equal(adapter(tmp_path), adapter(out))
    for name in ("trainable", "ema", "optimizer"):
        assert_equal(*(checkpoint.load_tensors(folder / "checkpoint-4", name) for folder in (tmp_path, out)))
    states = [checkpoint.read_state(folder / "checkpoint-4") for folder in (tmp_path, out)]
    assert {**states[0], "seconds": 0} == {**states[1], "seconds": 0}
    assert not list(tmp_path.glob(".*"))


def test_workers_and_gradient_checkpointing_change_nothing(tmp_path, data, straight):
    out, _ = straight
    kill_after(trainer_of(tmp_path, data, dataloader_num_workers=2, **FULL_STATE), 3)
    train(tmp_path, data, resume_from_checkpoint="checkpoint-2", gradient_checkpointing=True, **FULL_STATE)
    for line, other in zip(read_log(tmp_path), read_log(out), strict=True):
        assert line == pytest.approx(other, rel=1e-5, nan_ok=True)


def test_the_latest_of_no_checkpoints_is_the_beginning(tmp_path, data):
    kill_after(trainer_of(tmp_path, data, max_train_steps=3), 2)
    killed = read_log(tmp_path)
    assert json.loads((tmp_path / "training.json").read_text())["state"] == "running"
    assert train(tmp_path, data, max_train_steps=3, resume_from_checkpoint="latest").step == 3
    assert json.loads((tmp_path / "training.json").read_text())["state"] == "complete"
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2, 3] and read_log(tmp_path)[:2] == killed


def test_resuming_with_other_settings_names_them(tmp_path, data, straight):
    out, _ = straight
    other = trainer_of(tmp_path / "new", data, resume_from_checkpoint=str(out / "checkpoint-2"), **{**FULL_STATE, "share": 0.25, "seed": 3})
    with pytest.raises(InputError, match=r"checkpoint-2: resuming wants .* but seed was 0 and is 3; share was 0.5 and is 0.25"):
        other.run()
    assert not (tmp_path / "new").exists()
    groups = [((0,), (1,)), ((2,),), ((3,), (4,)), ((5,),), ((6,),)]
    with pytest.raises(InputError, match=r"checkpoint-2: GroupBatchSampler.load_state_dict: groups_sha256 was"):
        trainer_of(tmp_path / "new", data, groups=groups, resume_from_checkpoint=str(out / "checkpoint-2"), **FULL_STATE).run()
    assert not (tmp_path / "new").exists()


def test_only_the_last_checkpoints_are_kept(tmp_path, data):
    train(tmp_path, data, checkpointing_steps=1, checkpoints_total_limit=2)
    assert [place.name for place in checkpoint.checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4"]
    again = train(tmp_path, data, checkpointing_steps=1, checkpoints_total_limit=1, max_train_steps=5, resume_from_checkpoint="latest")
    assert again.step == 5 and [place.name for place in checkpoint.checkpoints(tmp_path)] == ["checkpoint-5"]


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    weights = {"a": torch.ones(2), "b": torch.zeros(3)}
    place = checkpoint.write_checkpoint(tmp_path, 7, {"trainable": weights}, {"settings": {}})
    assert place.name == "checkpoint-7" and checkpoint.read_state(place)["step"] == 7
    into = {"a": torch.zeros(2), "b": torch.ones(3)}
    checkpoint.load_weights(place, "trainable", into)
    assert_equal(into, weights)
    with pytest.raises(InputError, match=r"of another model: for b it holds \[3\], wanted nothing"):
        checkpoint.load_weights(place, "trainable", {"a": torch.zeros(2)})
    with pytest.raises(InputError, match=r"of another model: for b it holds \[3\], wanted \[4\]"):
        checkpoint.load_weights(place, "trainable", {"a": torch.zeros(2), "b": torch.zeros(4)})
    (place / "trainable.safetensors").write_bytes((place / "trainable.safetensors").read_bytes()[:-4])
    with pytest.raises(InputError, match="trainable.safetensors cannot be read"):
        checkpoint.load_weights(place, "trainable", into)
    (place / "state.json").write_text('{"format": "another"}')
    with pytest.raises(InputError, match="no checkpoint of this version of sage"):
        checkpoint.read_state(place)


def test_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
    def broken(*args, **options):
        raise OSError("disk full")

    checkpoint.write_checkpoint(tmp_path, 1, {"trainable": {"a": torch.ones(1)}}, {})
    monkeypatch.setattr(checkpoint, "to_json", broken)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_checkpoint(tmp_path, 2, {"trainable": {"a": torch.ones(1)}}, {})
    assert [place.name for place in checkpoint.checkpoints(tmp_path)] == ["checkpoint-1"]


# ---- data


def test_caches_change_nothing_but_rounding(tmp_path, data):
    asked = {"center_crop": True, "random_flip": True}
    train(tmp_path / "plain", data, **asked)
    train(tmp_path / "cached", data, cache_latents=True, cache_text=True, dataloader_num_workers=1, **asked)
    for line, other in zip(*(read_log(tmp_path / name) for name in ("plain", "cached")), strict=True):
        assert line == pytest.approx(other, rel=1e-4)
    assert len(list((tmp_path / "cached" / "cache" / "latents").rglob("*.safetensors"))) == 2 * 7
    assert len(list((tmp_path / "cached" / "cache" / "text").rglob("*.safetensors"))) == 7


def test_one_picture_is_enough(tmp_path):
    data = write_pictures(tmp_path / "data", ["a red cat"])
    train(tmp_path / "out", data, groups=[((0,),)], max_train_steps=2)
    assert [line["rows"] for line in read_log(tmp_path / "out")] == [1, 1]


def test_groups_that_no_batch_can_hold_are_refused(tmp_path, data):
    with pytest.raises(InputError, match="--train_batch_size: .* 1 group of 4 cannot go into batch_size 2"):
        trainer_of(tmp_path / "out", data, train_batch_size=2)
    assert not (tmp_path / "out").exists()


def test_steps_follow_from_epochs(tmp_path, data):
    trainer = train(tmp_path, data, max_train_steps=None, num_train_epochs=3)
    assert trainer.total == trainer.step == 6 and [line["epoch"] for line in read_log(tmp_path)] == [0, 0, 1, 1, 2, 2]
    assert sum(line["rows"] for line in read_log(tmp_path)) == 3 * 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.05}, r"--share 0.05: of the calls of 4 steps that is none"),
        ({"resolution": 17}, "--resolution must be a multiple of 2 for a StableDiffusionPipeline, got 17"),
    ],
)
def test_what_does_not_fit_the_pipeline_is_refused(tmp_path, data, options, message):
    with pytest.raises(InputError, match=message):
        trainer_of(tmp_path / "out", data, **options)
    assert not (tmp_path / "out").exists()


# ---- families and what they save


def predicted(family):
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return family.predict(latents, torch.tensor([100, 900]), family.encode_prompts(["a red cat", "a red car"]))


@pytest.mark.parametrize("name", test_training_families.CASES)
def test_every_family_learns_and_its_adapter_loads_back(name, tmp_path, data):
    build, call = test_training_families.CASES[name]
    pipe = build()
    known = FAMILIES[type(pipe).__name__].call_arguments
    family = family_for(pipe, **{key: value for key, value in call.items() if key in known})
    before = predicted(family)
    side = {"resolution": 32} if name == "Sana" else {}  # whose autoencoder is told to have a factor of 32
    options = options_for(tmp_path, data, max_train_steps=2, lora_alpha=8.0, caption_dropout=0.3, **side)
    Trainer(family, read_training_set(data, progress=False), GROUPS, options, say=str, progress=False).run()
    family.denoiser.eval()
    after = predicted(family)
    assert (after - before).abs().max() > 1e-3
    with adapter_off(family.denoiser):
        assert torch.equal(predicted(family), before)
    fresh = family_for(build(), **family.asked)
    assert torch.equal(predicted(fresh), before)
    assert sage.load_adapter(fresh.pipe, tmp_path).share == 0.4
    assert torch.allclose(predicted(fresh), after, atol=1e-6)
    sage.unload_adapter(fresh.pipe)
    assert torch.equal(predicted(fresh), before)
    if hasattr(fresh.pipe, "load_lora_weights"):
        fresh.pipe.load_lora_weights(str(tmp_path))
        assert torch.allclose(predicted(fresh), after, atol=1e-6)


def test_the_saved_weights_are_the_averaged_ones(straight):
    out, trainer = straight
    saved = checkpoint.load_tensors(out / "checkpoint-4", "ema")
    weights = {name.replace(".default", ""): value for name, value in saved.items()}
    assert_equal(get_peft_model_state_dict(trainer.family.denoiser), weights)
    raw = checkpoint.load_tensors(out / "checkpoint-4", "trainable")
    assert any(not torch.equal(raw[name], value) for name, value in saved.items())


def test_sharing_takes_the_share_that_the_adapter_was_trained_for(straight):
    out, _ = straight
    pipe = tiny.stable_diffusion()
    assert usual_share(pipe) == 0.4
    settings = sage.load_adapter(pipe, out)
    assert settings == read_adapter_settings(out) == AdapterSettings(0.5, 4, "posterior", 0.6, "tiny")
    asked = {"similarity": 0.1, "num_inference_steps": 4, "output_type": "latent", "progress": False, "encoder": "pipeline"}
    prompts = ["a red cat", "a red car"]
    assert sage.generate(pipe, prompts, **asked).stats["rows"] == [1, 1, 2, 2]
    assert sage.generate(pipe, prompts, share=0.25, **asked).stats["rows"] == [1, 2, 2, 2]
    with sage.enable(pipe, similarity=0.1, encoder="pipeline") as sharing:
        pipe(prompts, num_inference_steps=4, output_type="latent")
    assert sharing.stats["rows"] == [1, 1, 2, 2]
    pipe.unload_lora_weights()  # by diffusers' own means
    assert usual_share(pipe) == 0.4
    pipe.load_lora_weights(str(out))
    assert usual_share(pipe) == 0.4


def test_files_that_are_no_adapters_are_refused(tmp_path, straight):
    pipe = tiny.stable_diffusion()
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.bin").write_bytes(b"x")
    (tmp_path / "broken.safetensors").write_bytes(b"x")
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    for name, message in (("nowhere", "no such file or folder"), ("empty", "no pytorch_lora_weights.safetensors in this folder"),
                          ("weights.bin", "wanted a .safetensors file, got .bin"), ("broken.safetensors", "cannot be read as safetensors"),
                          ("other.safetensors", "cannot be loaded into|holds no LoRA layers")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            sage.load_adapter(pipe, tmp_path / name)
    assert usual_share(pipe) == 0.4 and read_adapter_settings(tmp_path / "other.safetensors") is None
    pixart = test_training_families.CASES["PixArt-sigma"][0]()
    with pytest.raises(InputError, match="diffusers has no loader for a PixArtSigmaPipeline"):
        sage.load_adapter(pixart, straight[0])


def test_the_file_describes_the_lora(straight):
    with safe_open(adapter_file(straight[0]), "pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    assert config == {"unet.lora_alpha": 4, "unet.r": 4, "unet.target_modules": ["to_k", "to_out.0", "to_q", "to_v"]}


def test_all_weights_can_be_trained(tmp_path, data):
    trainer = train(tmp_path, data, full=True, max_train_steps=2, learning_rate=1e-3)
    pipe = type(trainer.family.pipe).from_pretrained(tmp_path)
    assert_equal(pipe.unet.state_dict(), trainer.family.denoiser.state_dict())
    stock = tiny.stable_diffusion().unet.state_dict()
    assert all(not torch.equal(value, stock[key]) for key, value in pipe.unet.state_dict().items() if value.ndim > 1)
    assert_equal(pipe.vae.state_dict(), tiny.stable_diffusion().vae.state_dict())
    assert json.loads((tmp_path / "sage.json").read_text())["share"] == 0.4


@pytest.fixture
def fresh_accelerate():
    """accelerate keeps one precision per process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_half_precision_keeps_what_is_trained_in_float32(tmp_path, data, fresh_accelerate):
    asked = {"consistency_weight": 0.5, "consistency_teacher": "base", "max_train_steps": 2, "learning_rate": 1e-4}
    drawn = {"validation_prompt": ("a red cat",), "num_validation_images": 1, "encoder": "pipeline"}
    trainer = train(tmp_path / "half", data, mixed_precision="bf16", **asked, **drawn)
    AcceleratorState._reset_state(reset_partial_state=True)
    train(tmp_path / "whole", data, **asked)
    unet = trainer.family.denoiser
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.bfloat16, torch.float32} and "forward" not in vars(unet)
    assert {parameter.dtype for parameter in trainable(unet).values()} == {torch.float32}
    assert {value.dtype for value in adapter(tmp_path / "half").values()} == {torch.float32}
    for line, other in zip(read_log(tmp_path / "half"), read_log(tmp_path / "whole"), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=0.05) and line["loss"] != other["loss"]
    assert len(list((tmp_path / "half" / "validation").rglob("*.png"))) == 1


def test_the_adapter_is_off_inside_and_trainable_after():
    unet = tiny.stable_diffusion().unet
    attach_adapter(unet, ["to_q"], 2, seed=1)
    first = {name: value.clone() for name, value in trainable(unet).items()}
    assert first and all("lora_" in name for name in first)
    with adapter_off(unet):
        assert not trainable(unet)
    assert_equal(first, trainable(unet))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    others = [tiny.stable_diffusion().unet for _ in range(2)]
    torch.set_rng_state(state)
    for other, seed in zip(others, (1, 2)):
        attach_adapter(other, ["to_q"], 2, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert_equal(first, trainable(others[0]))
    assert any(not torch.equal(value, first[name]) for name, value in trainable(others[1]).items())


def test_validation_pictures_are_drawn_shared_and_disturb_nothing(tmp_path, data):
    asked = {"max_train_steps": 3, "use_ema": True}
    train(tmp_path / "blind", data, **asked)
    prompts = ("a red cat", "a red car")
    train(tmp_path / "out", data, validation_prompt=prompts, num_validation_images=2, similarity=-0.9, encoder="pipeline", **asked)
    assert read_log(tmp_path / "blind") == read_log(tmp_path / "out")
    assert_equal(adapter(tmp_path / "blind"), adapter(tmp_path / "out"))
    drawn = sorted(file.relative_to(tmp_path / "out" / "validation").as_posix() for file in (tmp_path / "out" / "validation").rglob("*.png"))
    names = ["00000-a-red-cat.png", "00001-a-red-cat.png", "00002-a-red-car.png", "00003-a-red-car.png"]
    assert drawn == [f"step-{step:06d}/{name}" for step in (2, 3) for name in names]
