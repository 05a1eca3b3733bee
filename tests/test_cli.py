"""The command line against a tiny random pipeline: what it writes, what it refuses, and how it speaks."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from PIL import Image

from sage.cli import cli, saving_sentence
from sage.embed import Embeddings
from sage.output import read_manifest
from sage.plan import SharingPlan

PROMPTS = ["a red cat", "a red car", "../../etc/x", "a red cat", "an old <b>house</b> by the sea 🏠"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The tiny pipeline in a folder, as a user would have it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.stable_diffusion().save_pretrained(folder)
    return folder


def embed_by_letters(prompts, encoder="auto", pipe=None, **options):
    """Equal first letters: alike; others: not. So no test needs the shipped encoder."""
    if encoder == "nowhere":
        raise FileNotFoundError("embed_prompts: encoder folder 'nowhere' does not exist")
    vectors = np.zeros((len(prompts), 64), dtype=np.float32)
    for row, prompt in enumerate(prompts):
        vectors[row, sum(map(ord, prompt[:3])) % 64] = 1
    return Embeddings(vectors, "first letters", np.zeros(len(prompts), dtype=bool))


@pytest.fixture(scope="module", autouse=True)
def surroundings():
    """One thread (tiny layers only lose by more), and prompts embedded by their letters."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sage.embed.embed_prompts", embed_by_letters)
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return path


def sage(*arguments, input=None):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], input=input)


def generate(prompts, out, model, *more):
    return sage("generate", prompts, "--out", out, "--model", model, "--device", "cpu", "--steps", 4, *more)


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """One compared run that several tests look at."""
    out = tmp_path_factory.mktemp("run")
    source = out / "prompts.txt"
    source.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    result = generate(source, out / "pictures", model, "--compare", "--solver", "dpm++2m", "--negative-prompt", "blurry")
    assert result.exit_code == 0, result.output
    return out / "pictures", result


def test_everything_is_written(run):
    folder, result = run
    assert {path.name for path in folder.iterdir()} == {
        "index.html", "images", "unshared", "manifest.jsonl", "unshared.jsonl", "plan.json", "report.json",
    }  # fmt: skip
    rows = read_manifest(folder / "manifest.jsonl")
    assert [row["prompt"] for row in rows] == PROMPTS
    assert [row["index"] for row in rows] == list(range(5))
    assert all((folder / row["file"]).resolve().is_relative_to(folder.resolve()) for row in rows)
    assert str(folder / "index.html") in result.stdout and "denoiser rows instead of" in result.stdout
    assert not [path for path in folder.rglob("*") if path.suffix == ".part"]


def test_report_has_planned_and_actual_cost(run):
    folder, _ = run
    report = json.loads((folder / "report.json").read_text())
    plan = SharingPlan.load(folder / "plan.json")
    assert report["state"] == "complete"
    assert report["stats"]["nfe"] == plan.cost(4).nfe < report["stats"]["nfe_independent"] == 20
    assert report["unshared_stats"]["nfe"] == 20
    assert report["settings"]["steps"] == 4 and report["settings"]["solver"] == "dpm++2m"
    assert report["versions"]["torch"] and report["machine"]["cores"] >= 1
    assert report["seconds"].keys() >= {"loading", "planning", "images", "unshared"}


def test_documented_keys_are_the_written_keys(run):
    folder, _ = run
    text = (Path(__file__).resolve().parent.parent / "docs" / "output.md").read_text(encoding="utf-8")
    report = json.loads((folder / "report.json").read_text())
    written = {*read_manifest(folder / "manifest.jsonl")[0], *report, *report["stats"]} - {"encoder"}
    assert [key for key in written if f"`{key}`" not in text] == []


def test_two_copies_of_a_prompt_are_two_pictures(run):
    folder, _ = run
    rows = read_manifest(folder / "manifest.jsonl")
    first, second = rows[0], rows[3]
    assert first["prompt"] == second["prompt"] and first["seed"] != second["seed"]
    assert first["sha256"] != second["sha256"]
    assert (first["image_index"], second["image_index"]) == (0, 1)


def test_lone_pictures_equal_the_unshared_ones(run):
    folder, _ = run
    shared, unshared = (read_manifest(folder / name) for name in ("manifest.jsonl", "unshared.jsonl"))
    lone = [row for row in shared if row["group_size"] == 1]
    assert len(lone) >= 2
    for row in lone:
        with Image.open(folder / row["file"]) as ours, Image.open(folder / unshared[row["index"]]["file"]) as theirs:
            distance = np.abs(np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int)).max()
        assert distance <= 1  # the denoiser's own arithmetic varies with the batch size


def test_png_carries_prompt_seed_and_plan(run):
    folder, _ = run
    row = read_manifest(folder / "manifest.jsonl")[4]
    with Image.open(folder / row["file"]) as picture:
        text = picture.text
    assert text["prompt"] == PROMPTS[4] and text["negative_prompt"] == "blurry" and text["seed"] == str(row["seed"])
    about = json.loads(text["sage"])
    assert about["solver"] == "dpm++2m" and about["steps"] == 4 and about["branch_call"] == row["branch_call"]


def test_resume_completes_what_is_missing_with_equal_files(model, prompts, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = ("--max-rows", 4, "--seed", 5)
    assert generate(prompts, whole, model, *options).exit_code == 0
    assert generate(prompts, cut, model, *options).exit_code == 0
    files = sorted((cut / "images").iterdir())
    files[1].unlink()
    files[4].write_bytes(b"half a picture")
    with open(cut / "manifest.jsonl", "a") as manifest:
        manifest.write('{"file": "images/00002-')  # a line that a crash cut
    result = generate(prompts, cut, model, *options, "--resume")
    assert result.exit_code == 0, result.output
    assert "3 of 5 pictures are there already" in result.stderr
    assert pictures(cut / "images") == pictures(whole / "images")
    assert (cut / "manifest.jsonl").read_text() == (whole / "manifest.jsonl").read_text()
    again = generate(prompts, cut, model, *options, "--resume")
    assert again.exit_code == 0 and "Every picture was there already" in again.stdout


def test_resume_refuses_other_settings_and_names_them(model, prompts, tmp_path):
    out = tmp_path / "out"
    assert generate(prompts, out, model).exit_code == 0
    result = generate(prompts, out, model, "--resume", "--seed", 9, "--share", 0.5)
    assert result.exit_code == 2 and "seed was 0 and is 9" in result.stderr and "share was 0.4 and is 0.5" in result.stderr
    prompts.write_text("another\n")
    result = generate(prompts, out, model, "--resume")
    assert result.exit_code == 2 and "the prompts are others" in result.stderr


def test_an_interrupted_run_keeps_what_is_finished(model, prompts, tmp_path, monkeypatch):
    from sage.output import PictureSeries

    add = PictureSeries.add

    def add_once(self, *pack):
        if self.rows:
            raise OSError(28, "No space left on device")
        add(self, *pack)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(PictureSeries, "add", add_once)
        result = generate(prompts, out, model, "--max-rows", 4)
    assert result.exit_code == 1 and "No space left" in result.stderr and "--resume makes the rest" in result.stderr
    assert "Traceback" not in result.output
    finished = read_manifest(out / "manifest.jsonl")
    assert 1 <= len(finished) < 5 and len(pictures(out / "images")) == len(finished)
    assert json.loads((out / "report.json").read_text())["state"] == "running"
    assert generate(prompts, out, model, "--max-rows", 4, "--resume").exit_code == 0
    assert len(pictures(out / "images")) == 5


def test_a_compared_run_stopped_in_its_second_half_keeps_the_first(model, prompts, tmp_path, monkeypatch):
    from sage.output import PictureSeries

    add = PictureSeries.add

    def add_shared(self, *pack):
        if self.folder == "unshared":
            raise KeyboardInterrupt
        add(self, *pack)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(PictureSeries, "add", add_shared)
        assert generate(prompts, out, model, "--compare", "--solver", "heun").exit_code == 130
    stats = json.loads((out / "report.json").read_text())["stats"]
    result = generate(prompts, out, model, "--compare", "--solver", "heun", "--resume")
    assert result.exit_code == 0, result.output
    assert "about" in result.stderr and "rows instead of" not in result.stderr  # calls are not steps with Heun
    assert f"{stats['nfe']} denoiser rows instead of" in result.stdout
    assert json.loads((out / "report.json").read_text())["stats"] == stats
    (out / "plan.json").write_text("{")
    result = generate(prompts, out, model, "--compare", "--solver", "heun", "--resume")
    assert result.exit_code == 2 and "plan.json" in result.stderr and "--plan" not in result.stderr


def test_the_last_sentence_needs_no_stats_of_either_half():
    missing, done = {"pictures": 0, "kept": 5}, {"seconds": 2.0, "pictures": 5, "kept": 0}
    assert "not known" in saving_sentence({"stats": missing, "unshared_stats": done, "seconds": {"planning": 1.0}})
    stats = {"nfe": 5, "nfe_independent": 10, "saving": 0.5, "images_per_second": 1.0, **done}
    assert "50.0% saved" in saving_sentence({"stats": stats, "unshared_stats": missing, "seconds": {"planning": 1.0}})


def test_a_model_without_prompts_is_refused(prompts, tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(8, 3, 3, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
                       down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "model")
    result = generate(prompts, tmp_path / "out", tmp_path / "model")
    assert result.exit_code == 2 and "a DDPMPipeline takes no prompt" in result.stderr


def test_an_encoder_that_cannot_be_loaded_is_an_input_error(prompts, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("embed_prompts: cannot load encoder 'x'")

    monkeypatch.setattr("sage.embed.embed_prompts", fail)
    result = sage("plan", prompts, "--encoder", "x")
    assert result.exit_code == 2 and "--encoder x: embed_prompts: cannot load" in result.stderr


def test_seeds_and_negatives_from_jsonl(model, tmp_path):
    source = tmp_path / "prompts.jsonl"
    source.write_text('{"prompt": "a red cat", "seed": 11, "negative_prompt": "dark"}\n{"prompt": "a red car", "seed": 2}\n')
    out = tmp_path / "out"
    result = generate(source, out, model, "--images-per-prompt", 2, "--negative-prompt", "blurry")
    assert result.exit_code == 0, result.output
    rows = read_manifest(out / "manifest.jsonl")
    assert [row["seed"] for row in rows] == [11, 12, 2, 3]
    assert [row["negative_prompt"] for row in rows] == ["dark", "dark", "blurry", "blurry"]


def test_a_saved_plan_is_followed(model, prompts, tmp_path):
    saved = tmp_path / "plan.json"
    assert sage("plan", prompts, "--share", 0.5, "--out", saved).exit_code == 0
    out = tmp_path / "out"
    assert generate(prompts, out, model, "--plan", saved).exit_code == 0
    made, planned = SharingPlan.load(out / "plan.json"), SharingPlan.load(saved)
    assert made.roots == planned.roots and all(leaf.seed is not None for leaf in made.leaves)


ALIKE = ["a red cat", "a red car", "a red cap", "a red can", "the sea"]  # equal vectors, but for the last


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (("--share", "0.25:0.5"), {"share": [0.25, 0.5], "similarity": 0.6, "tree": None}),
        (("--tree", "--share", 0.5), {"share": 0.5, "tree": True, "similarity": None}),
        (("--budget", 0.6), {"share": None, "budget": 0.6}),
        (("--quality", "fast", "--max-group-size", 2), {"share": None, "quality": "fast", "max_group_size": 2}),
    ],
)
def test_each_way_to_share_makes_pictures_and_resumes(model, tmp_path, options, settings):
    source, out = tmp_path / "prompts.txt", tmp_path / "out"
    source.write_text("\n".join(ALIKE))
    result = generate(source, out, model, *options)
    assert result.exit_code == 0, result.output
    report, plan = json.loads((out / "report.json").read_text()), SharingPlan.load(out / "plan.json")
    assert report["settings"].items() >= settings.items()
    assert report["stats"]["nfe"] == plan.cost(4).nfe < 20
    planned = json.loads(sage("plan", source, "--steps", 4, "--json", *options).stdout)
    assert planned["nfe"] == plan.cost(4).nfe
    (out / "images" / "00000-a-red-cat.png").unlink()
    again = generate(source, out, model, *options, "--resume")
    assert again.exit_code == 0 and len(pictures(out / "images")) == 5
    other = generate(source, out, model, "--share", 0.1, "--resume")
    assert other.exit_code == 2 and "--resume wants the settings of the run that is there" in other.stderr
    rate = json.loads(sage("plan", source, "--rate", out / "report.json", "--json").stdout)["rate"]
    assert rate > 0


def test_a_budget_is_for_the_steps_of_the_run(model, tmp_path):
    source = tmp_path / "prompts.txt"
    source.write_text("\n".join(ALIKE))
    for steps, rows in ((4, 12), (10, 30)):
        result = generate(source, tmp_path / f"out{steps}", model, "--budget", 0.6, "--steps", steps)
        assert result.exit_code == 0, result.output
        report = json.loads((tmp_path / f"out{steps}" / "report.json").read_text())
        assert report["stats"]["nfe"] == rows and report["stats"]["nfe_independent"] == 5 * steps


def test_a_saved_plan_and_ways_to_make_one_exclude_each_other(model, prompts, tmp_path):
    saved = tmp_path / "plan.json"
    assert sage("plan", prompts, "--out", saved).exit_code == 0
    result = generate(prompts, tmp_path / "out", model, "--plan", saved, "--tree", "--similarity", 0.5)
    assert result.exit_code == 2 and "--plan and --tree, --similarity exclude each other" in result.stderr


def test_long_prompts_are_counted(model, tmp_path):
    source = tmp_path / "prompts.txt"
    source.write_text("short\n" + "long " * 60 + "\n")
    result = generate(source, tmp_path / "out", model)
    assert result.exit_code == 0, result.output
    assert "1 prompt of 2 longer than the 77 tokens" in result.stderr


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (("--share", 1.5), "--share must lie in [0, 1], got 1.5"),
        (("--share", "nan"), "--share must lie in [0, 1]"),
        (("--similarity", -1), "--similarity must lie in (-1, 1], got -1"),
        (("--similarity", 1.01), "--similarity must lie"),
        (("--max-group-size", 0), "--max-group-size must be at least 1"),
        (("--images-per-prompt", 0), "--images-per-prompt must be at least 1"),
        (("--steps", 0), "--steps must be at least 1"),
        (("--max-rows", 0), "--max-rows must be at least 1"),
        (("--seed", -3), "--seed: seed must be a whole number"),
        (("--guidance-scale", "nan"), "--guidance-scale must be a number"),
        (("--solver", "magic"), "known solvers: ddim, ddpm, euler"),
        (("--solver", "flow-euler"), "--solver flow-euler"),
        (("--device", "toaster"), "--device toaster"),
        (("--encoder", "nowhere"), "encoder folder 'nowhere' does not exist"),
        (("--plan", "missing.json"), "--plan missing.json: cannot be read"),
        (("--overwrite", "--resume"), "exclude each other"),
        (("--budget", 0.5, "--quality", "high"), "--budget and --quality exclude each other"),
        (("--embeddings", "missing.npy"), "--embeddings missing.npy: no such file"),
        (("--budget", 0.01), "--budget 0.01: budget must be at least"),
        (("--dtype", "float8"), "'float8' is not one of"),
    ],
)
def test_bad_options_are_refused_before_any_work(model, prompts, tmp_path, options, wanted):
    out = tmp_path / "out"
    result = generate(prompts, out, model, *options)
    assert result.exit_code == 2, result.output
    assert wanted in " ".join(result.stderr.split()) and "Traceback" not in result.output
    assert not out.exists()


def test_bad_prompt_files_are_refused(model, tmp_path):
    source = tmp_path / "prompts.txt"
    for data, wanted in ((b"\n\n", "no prompts in it"), (b"a\n\xff\n", "line 2, byte 1 (0xff)")):
        source.write_bytes(data)
        result = generate(source, tmp_path / "out", model)
        assert result.exit_code == 2 and wanted in result.stderr and not (tmp_path / "out").exists()


def test_plans_for_other_prompts_are_refused(model, prompts, tmp_path):
    saved, others = tmp_path / "plan.json", tmp_path / "others.txt"
    others.write_text("a\nb\n")
    assert sage("plan", others, "--out", saved).exit_code == 0
    result = generate(prompts, tmp_path / "out", model, "--plan", saved)
    assert result.exit_code == 2 and "it is for 2 pictures, but 5 are asked for" in result.stderr
    others.write_text("a\nc\n")
    result = generate(others, tmp_path / "out", model, "--plan", saved)
    assert result.exit_code == 2 and "picture 1 is planned for 'b', but asked for 'c'" in result.stderr
    saved.write_text("{}")
    assert "not a sharing plan" in generate(others, tmp_path / "out", model, "--plan", saved).stderr


def test_output_folder_in_use(model, prompts, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    assert generate(prompts, out, model, "--overwrite").exit_code == 0
    (out / "mine.txt").write_text("keep")
    prompts.write_text("only one\n")
    assert "--resume completes it, --overwrite starts anew" in generate(prompts, out, model).stderr
    assert generate(prompts, out, model, "--overwrite").exit_code == 0
    assert list(pictures(out / "images")) == ["00000-only-one.png"] and (out / "mine.txt").exists()
    result = generate(prompts, out, model, "--overwrite", "--plan", out / "plan.json")
    assert result.exit_code == 2 and "--overwrite would remove this file" in result.stderr
    (out / "report.json").unlink()
    for option in ("--overwrite", "--resume"):
        result = generate(prompts, out, model, option)
        assert result.exit_code == 2 and str(out) in result.stderr and len(pictures(out / "images")) == 1


def test_model_folders(prompts, tmp_path):
    folder = tmp_path / "model"
    result = generate(prompts, tmp_path / "out", folder)
    assert result.exit_code == 2 and "no such folder" in result.stderr
    folder.mkdir()
    (folder / "readme.txt").touch()
    assert "no model_index.json in it (it holds readme.txt)" in generate(prompts, tmp_path / "out", folder).stderr
    (folder / "model_index.json").write_text("{")
    assert "not valid JSON" in generate(prompts, tmp_path / "out", folder).stderr
    (folder / "model_index.json").write_text('{"_class_name": ["mine", "Mine"]}')
    assert "names no pipeline class" in generate(prompts, tmp_path / "out", folder).stderr
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline", "unet": ["a", "b"]}')
    (folder / "unet").mkdir()
    (folder / "unet" / "diffusion_pytorch_model.bin").touch()
    result = generate(prompts, tmp_path / "out", folder)
    assert result.exit_code == 2 and "weights of unet are pickle files only" in result.stderr
    assert "single file" in generate(prompts, tmp_path / "out", folder / "readme.txt").stderr


def test_plan_text_and_json(prompts):
    text = sage("plan", prompts)
    assert text.exit_code == 0, text.output
    assert text.exit_code == 0 and "20%" in text.stdout and "40%" in text.stdout and "60%" in text.stdout
    data = json.loads(sage("plan", prompts, "--json").stdout)
    assert data["pictures"] == 5 and data["groups"][0]["prompts"] == ["a red cat", "a red car"]
    assert data["savings"]["as planned"] == pytest.approx(1 - data["nfe"] / data["nfe_independent"], abs=1e-6)
    assert len(data["alone"]) == 3


def test_plan_from_standard_input():
    result = sage("plan", "-", "--json", input='{"prompt": "a red cat"}\n{"prompt": "a red car"}\n')
    assert result.exit_code == 0 and json.loads(result.stdout)["pictures"] == 2


def test_plan_files_need_their_folder(prompts, tmp_path):
    result = sage("plan", prompts, "--out", tmp_path / "missing" / "plan.json")
    assert result.exit_code == 2 and "does not exist" in result.stderr


def test_a_plot_of_unknown_kind_is_refused_before_anything_is_written(prompts, tmp_path):
    result = sage("plan", prompts, "--out", tmp_path / "p.json", "--plot", tmp_path / "x.txt")
    assert result.exit_code == 2 and "must end in one of .png, .svg, .pdf" in result.stderr
    assert not (tmp_path / "p.json").exists()


def test_info():
    result = sage("info")
    assert result.exit_code == 0, result.output
    assert all(word in result.stdout for word in ("torch", "reference", "cpu", "Build", "Model"))
    listed = sage("info", "--schedulers").stdout
    assert "dpm++2m" in listed and "DDIMScheduler" in listed and "PNDMScheduler" in listed


def test_info_says_how_to_get_the_gpu_kernels(monkeypatch):
    import torch

    from sage.info import info_text
    from sage_kernels import backends

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(backends, "build_info", lambda: backends._UNBUILT | {"native": ["cpu"], "cuda_reason": "no nvcc"})
    text = info_text()
    assert "built without CUDA kernels: no nvcc" in text and backends.CUDA_MEND in text and "auto on cpu" in text


@pytest.mark.parametrize("command", [(), ("info",), ("cache",), ("plan",), ("generate",)])
def test_help_teaches(command):
    result = sage(*command, "--help")
    assert result.exit_code == 0 and "sage " in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 110
    assert command not in (("plan",), ("generate",)) or "Exit codes:" in result.stdout


def test_debug_shows_the_traceback(prompts, tmp_path):
    assert "Traceback" in sage("--debug", "generate", prompts, "--out", tmp_path, "--share", 3).output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "prompts.txt"], "--out prompts.txt: PROMPTS is the same file; give another name."),
        (["--html", "./prompts.txt"], "--html ./prompts.txt: PROMPTS is the same file"),
        (["--out", "x.html", "--html", "x.html"], "--out x.html: --html is the same file"),
    ],
)
def test_no_file_is_written_over_one_that_is_read_or_written(prompts, monkeypatch, options, message):
    monkeypatch.chdir(prompts.parent)
    before = prompts.read_bytes()
    result = sage("plan", "prompts.txt", *options)
    assert result.exit_code == 2 and message in result.output
    assert prompts.read_bytes() == before and not Path("x.html").exists()
