"""`sage train` from options to adapter: what it writes, what it refuses, and what a kill and a second process change: nothing."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny
import torch
from click.testing import CliRunner
from diffusers.optimization import SchedulerType
from safetensors.torch import load_file
from training_parts import read_log, write_pictures

from sage.cli import cli
from sage.prompts import InputError
from sage.training import options
from sage.training.data import INTERPOLATION
from sage.training.options import TrainOptions
from sage.training.targets import TRUNK_KINDS

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = ("--resolution", 16, "--train_batch_size", 4, "--num_inference_steps", 4, "--learning_rate", 1e-3)
ALIKE = ("--encoder", "pipeline", "--similarity", -0.9)  # so that everything is in groups


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.stable_diffusion().save_pretrained(folder)
    return folder


def sage(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def train(out, data, model, *arguments):
    result = sage("train", "--train_data_dir", data, "--model", model, "--out", out, *STEPS, *ALIKE, *arguments)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data, model):
    """(folder, what was said) of six steps."""
    out = tmp_path_factory.mktemp("trained") / "out"
    return out, train(out, data, model, "--max_train_steps", 6, "--checkpointing_steps", 2, "--max_group_size", 3, "--share", 0.5)


# ---- what it does


def test_it_says_what_it_found_and_writes_adapter_log_and_record(trained):
    out, result = trained
    assert "7 pictures, 7 captions, 7 of them in 3 groups; trunks are trained from timestep 251 up." in result.output
    assert result.stdout.startswith("6 steps in ")
    names = {"checkpoint-2", "checkpoint-4", "checkpoint-6", "log.jsonl", "pytorch_lora_weights.safetensors", "training.json"}
    assert {entry.name for entry in out.iterdir()} == names
    record = json.loads((out / "training.json").read_text())
    assert (record["state"], record["steps"], record["t_star"], record["pictures"]) == ("complete", 6, 251, 7)
    assert record["settings"]["share"] == 0.5 and record["settings"]["images_per_step"] == 4 and "output_dir" not in record["settings"]
    for line in read_log(out):
        parts = [line[name] for name in ("trunk_loss", "branch_loss") if line[name] is not None]
        assert min(parts) - 1e-6 <= line["loss"] <= max(parts) + 1e-6  # a mean over all rows
    assert not [file for file in out.rglob("*") if file.suffix in (".bin", ".pt", ".pkl", ".pth")]


def test_generate_takes_the_adapter_and_its_share(tmp_path, trained, model):
    out, _ = trained
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat\na red car\n")
    asked = ("generate", prompts, "--model", model, *ALIKE, "--steps", 4)
    shared, other, plain = tmp_path / "shared", tmp_path / "other", tmp_path / "plain"
    for folder, more in ((shared, ("--adapter", out)), (other, ("--adapter", out, "--share", 0.25)), (plain, ())):
        result = sage(*asked, "--out", folder, *more)
        assert result.exit_code == 0, result.output
    reports = [json.loads((folder / "report.json").read_text()) for folder in (shared, other, plain)]
    assert [report["settings"]["share"] for report in reports] == [0.5, 0.25, 0.4]
    assert reports[0]["stats"]["rows"] == [1, 1, 2, 2] and "adapter" not in reports[2]["settings"]
    assert reports[0]["settings"]["adapter"] == reports[1]["settings"]["adapter"]
    result = sage(*asked, "--out", shared, "--resume")
    assert result.exit_code == 2 and "adapter was" in result.output
    result = sage(*asked, "--out", tmp_path / "new", "--adapter", tmp_path / "nowhere")
    assert result.exit_code == 2 and "--adapter" in result.output and "no such file or folder" in result.output
    assert not (tmp_path / "new").exists()


# ---- options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--share", 1), "--share must be in (0, 1)"),
        (("--train_batch_size", 0), "--train_batch_size must be at least 1, got 0"),
        (("--caption_dropout", 2), "--caption_dropout must be in [0, 1], a probability, got 2"),
        (("--learning_rate", "nan"), "--learning_rate must be a number above 0, got nan"),
        (("--snr_gamma", 0), "--snr_gamma must be a number above 0, got 0"),
        (("--similarity", 2), "--similarity must be in (-1, 1], got 2"),
        (("--adam_beta2", 1), "--adam_beta2 must be in [0, 1), got 1"),
        (("--seed", -1), "--seed"),
        (("--soft_target", "none", "--consistency_weight", 1), "--soft_target none and --consistency_weight exclude each other"),
        (("--soft_target", "none", "--branch_weight", 2), "--soft_target none and --branch_weight exclude each other"),
        (("--full", "--consistency_teacher", "base"), "--full and --consistency_teacher base exclude each other"),
        (("--cache_latents",), "--cache_latents needs --center_crop"),
        (("--dataset_name", "x"), "by one of --train_data_dir (a folder) and --dataset_name"),
        (("--resume_from_checkpoint", "checkpoint-3"), "--resume_from_checkpoint checkpoint-3: no checkpoint there"),
        (("--soft_target", "hard"), "'hard' is not one of 'posterior', 'own', 'mean', 'none'"),
        (("--model", "./nowhere"), "--model ./nowhere: no such folder"),
        (("--caption_column", "caption"), "no column 'caption'; there are 'file_name', 'text'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_touched(tmp_path, data, monkeypatch, arguments, message):
    monkeypatch.setattr("sage.training.command.load_model", None)  # nothing gets so far
    out = tmp_path / "out"
    result = sage("train", "--train_data_dir", data, "--out", out, *arguments)
    assert result.exit_code == 2 and message in result.output.replace("\n", " "), result.output
    assert not out.exists()


def test_output_folders_that_are_in_use_are_refused(tmp_path, data):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    for folder, more, message in (("file", (), "this is a file"), ("full", (), "the folder is not empty"),
                                  ("full", ("--resume_from_checkpoint", "latest"), "finds no training in this folder")):  # fmt: skip
        result = sage("train", "--train_data_dir", data, "--out", tmp_path / folder, *more)
        assert result.exit_code == 2 and message in result.output
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_no_pictures_is_said(tmp_path, data):
    for folder in ("nowhere", "."):
        result = sage("train", "--train_data_dir", tmp_path / folder, "--out", tmp_path / "out")
        assert result.exit_code == 2 and ("no such folder" in result.output or "no images" in result.output)
    result = sage("train", "--out", tmp_path / "out")
    assert result.exit_code == 2 and "--train_data_dir" in result.output


def test_a_model_that_no_family_covers_is_refused(tmp_path, data, model, monkeypatch):
    monkeypatch.setattr("sage.training.families.FAMILIES", {})
    result = sage("train", "--train_data_dir", data, "--model", model, "--out", tmp_path / "out", *STEPS)
    assert result.exit_code == 2, result.output
    assert "StableDiffusionPipeline cannot be trained" in result.output and not (tmp_path / "out").exists()


def test_every_option_is_a_flag_of_the_same_name_default_and_kind(monkeypatch):
    asked = []
    monkeypatch.setattr("sage.training.command.train", lambda options, say, progress: asked.append(options))
    assert sage("train", "--out", "a", "--train_data_dir", "b").exit_code == 0
    assert asked[0] == TrainOptions("a", train_data_dir="b")
    flags = {flag.name: flag for flag in cli.commands["train"].params}
    assert flags.keys() == TrainOptions.__dataclass_fields__.keys()
    short = {"output_dir": "--out", "pretrained_model_name_or_path": "--model"}
    for name, flag in flags.items():
        assert f"--{name}" in flag.opts and set(flag.opts) <= {f"--{name}", short.get(name)} and flag.help.endswith(".")
    given = {"share": 0.3, "rank": 8, "lora_alpha": 4.0, "validation_prompt": ("x", "y"), "full": True, "max_train_steps": 5, "snr_gamma": 5.0}
    assert sage("train", "--output_dir", "a", "--train_data_dir", "b", "--share", "0.3", "--rank", "8", "--lora_alpha", "4", "--full",
                "--validation_prompt", "x", "--validation_prompt", "y", "--max_train_steps", "5", "--snr_gamma", "5").exit_code == 0  # fmt: skip
    assert asked[1] == TrainOptions("a", train_data_dir="b", **given)


def test_names_that_options_know_are_those_of_the_libraries():
    assert {*options.INTERPOLATIONS} == {*INTERPOLATION}
    assert {*options.SOFT_TARGETS} == {*TRUNK_KINDS, "none"}
    assert {*options.SCHEDULES} == {kind.value for kind in SchedulerType} - {"piecewise_constant"}  # which has rules of its own


def test_the_record_leaves_out_what_does_not_matter():
    asked = TrainOptions("a", train_data_dir="b", train_batch_size=4)
    same = TrainOptions("c", train_data_dir="b", train_batch_size=2, shards=1, max_train_steps=5, validation_prompt=("x",))
    assert asked.settings(1, "no") == same.settings(2, "no")
    assert asked.settings(1, "no") != asked.settings(2, "no") and asked.settings(1, "no") != asked.settings(1, "bf16")
    decaying = [TrainOptions("a", train_data_dir="b", lr_scheduler="cosine", max_train_steps=steps).settings(1, "no") for steps in (5, 6)]
    assert decaying[0] != decaying[1]
    with pytest.raises(InputError, match="--lr_scheduler must be one of linear"):
        TrainOptions("a", train_data_dir=".", lr_scheduler="random").check()


# ---- kills and processes


def command_line(out, data, model, *arguments):
    given = ["train", "--train_data_dir", data, "--model", model, "--out", out, *STEPS, *ALIKE, *arguments]
    return ["-m", "sage.cli", *map(str, given)]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.deep
def test_a_kill_in_the_middle_changes_nothing(tmp_path, data, model):
    asked = ("--checkpointing_steps", 3, "--max_train_steps", 12, "--max_group_size", 3, "--use_ema", "--consistency_weight", 0.5)
    out = tmp_path / "killed"
    long = [*asked[:3], 100000, *asked[4:]]
    process = subprocess.Popen([sys.executable, *command_line(out, data, model, *long)], env=environment(), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 500
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "log.jsonl").is_file() and (out / "log.jsonl").read_text().count("\n") >= 5:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    _, said = process.communicate()
    assert process.returncode == -signal.SIGKILL, said.decode()[-2000:]
    done = max(int(place.name.split("-")[1]) for place in out.glob("checkpoint-*"))
    steps = max(done + 3, 12)
    train(out, data, model, *asked, "--max_train_steps", steps, "--resume_from_checkpoint", "latest")
    train(tmp_path / "straight", data, model, *asked, "--max_train_steps", steps)
    assert read_log(out) == read_log(tmp_path / "straight")
    files = [folder / "pytorch_lora_weights.safetensors" for folder in (out, tmp_path / "straight")]
    trained, expected = map(load_file, files)
    assert trained.keys() == expected.keys() and all(torch.equal(value, expected[name]) for name, value in trained.items())


@pytest.mark.deep
def test_two_processes_train_as_one_with_their_batches_put_together(tmp_path, data, model):
    asked = ("--max_train_steps", 4, "--max_group_size", 2, "--consistency_weight", 0.5, "--caption_dropout", 0.2, "--lora_alpha", 8,
             "--adam_epsilon", 1e-4)  # far above the rounding of gradients, which Adam would blow up where they are nearly 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]  # accelerate's own has MPI on CPUs
    out = tmp_path / "two"
    half = command_line(out, data, model, *asked, "--train_batch_size", 2)
    on_cpu = {**environment(), "ACCELERATE_USE_CPU": "true"}
    ran = subprocess.run([*launch, *half], env=on_cpu, capture_output=True, text=True, timeout=550, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert json.loads((out / "training.json").read_text())["processes"] == 2
    train(tmp_path / "one", data, model, *asked, "--shards", 2)
    both = read_log(out), read_log(tmp_path / "one")
    assert [line["rows"] for line in both[0]] == [4, 3, 4, 3]
    for line, other in zip(*both, strict=True):
        assert line == pytest.approx(other, rel=1e-5, abs=1e-9)
    weights = [load_file(folder / "pytorch_lora_weights.safetensors") for folder in (out, tmp_path / "one")]
    for name, value in weights[0].items():
        assert (value - weights[1][name]).abs().max() < 1e-5, name
        assert "lora.up" not in name or value.abs().max() > 1e-4, name
    assert ran.stdout.count("4 steps in") == 1  # the first process speaks for all
