"""`sage evaluate` from end to end on a tiny random pipeline: what it writes, how it goes on, what it refuses."""

import copy
import json
import re
import shutil
from pathlib import Path

import evaluation_parts as parts
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from sage.evaluation import runner
from sage.evaluation.command import render
from sage.evaluation.folder import read_results
from sage.evaluation.report import short_table, table
from sage.evaluation.runner import Runner
from sage.output import read_manifest
from sage.prompts import InputError

SMALL = ("--steps", "4,2", "--share", "0.5", "--budget", "0.8", "--images-per-prompt", 2, "--comfortable", 0)


@pytest.fixture(scope="module", autouse=True)
def surroundings():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        parts.patch(patch)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model, an adapter, prompts, and a folder of real pictures, one for each prompt."""
    folder = tmp_path_factory.mktemp("place")
    pipe = tiny.stable_diffusion()
    parts.lora(pipe, folder / "style")
    pipe.save_pretrained(folder / "model")
    names = parts.real_pictures(folder / "photos", len(parts.PROMPTS))
    (folder / "prompts.txt").write_text("\n".join(parts.PROMPTS) + "\n")
    lines = [json.dumps({"prompt": prompt, "image": name}) for prompt, name in zip(parts.PROMPTS, names)]
    (folder / "aligned.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def evaluate(place: Path, out: Path, *more, prompts="prompts.txt", small=SMALL):
    return parts.sage("evaluate", place / prompts, "--out", out, "--model", place / "model", "--device", "cpu", "--extractor", "clip:tiny",
                      *small, *more)


@pytest.fixture(scope="module")
def run(place, tmp_path_factory):
    """One run with everything, that several tests look at."""
    out = tmp_path_factory.mktemp("run") / "out"
    options = ("--images", place / "photos", "--adapter", place / "style", "--solver", "ddim", "--extractor", "clip:blind")
    result = evaluate(place, out, *options, prompts="aligned.jsonl")
    assert result.exit_code == 0, result.output
    return out, result, json.loads((out / "results.json").read_text())


def methods(results, solver=0) -> dict[str, dict]:
    return {row["key"]: row for row in results["solvers"][solver]["methods"]}


def test_everything_is_written(run):
    out, result, results = run
    assert {path.name for path in out.iterdir()} == {
        "results.json", "table.md", "plot.png", "sheets", "methods", "features", "evaluation.json",
    }  # fmt: skip
    keys = set(methods(results))
    assert {path.name for path in (out / "methods").iterdir()} == keys
    assert {path.stem for path in (out / "sheets").iterdir()} == keys | {"side-by-side"}
    assert all(len(parts.pictures(out / "methods" / key)) == 14 for key in keys)
    assert results["state"] == "complete" and results["prompts"]["evaluated"] == 7 and results["prompts"]["groups"] == 3
    assert results["prompts"]["chance"] == pytest.approx(3 / 7)
    assert results["small"].startswith("Only 14 pictures of 3 groups: too few for claims") and results["small"] in result.stdout


def test_the_methods_are_those_asked_for_with_and_without_the_adapter(run):
    _, _, results = run
    rows = methods(results).values()
    steps = results["solvers"][0]["reference_steps"]
    plain = {(row["label"], row["steps"]) for row in rows if row["adapter"] is None}
    tuned = {(row["label"], row["steps"]) for row in rows if row["adapter"] == "style"}
    at_knee = {("independent", steps), ("shared noise only", steps), ("share 0.5", steps)}
    assert at_knee <= plain and at_knee <= tuned and {("independent", 4), ("independent", 2)} <= plain
    refusals = [row["why"] for row in results["solvers"][0]["unavailable"]]
    assert refusals == ["none for this denoiser (UNet2DConditionModel has no cache in diffusers)"]


def test_costs_are_counted(run):
    """Groups of 3, 2 and 2: half of the calls shared saves 4/7 · 1/2 of the rows; 7 of 8 prompts have a neighbour."""
    _, _, results = run
    reference = methods(results)[results["solvers"][0]["reference"]]
    steps = reference["steps"]
    assert reference["nfe"] == 14 * steps and reference["rows_per_picture"] == 2 * steps and reference["guidance_copies"] == 2
    shared = next(row for row in methods(results).values() if row["label"] == "share 0.5" and row["adapter"] is None)
    assert shared["saved"]["grouped"] == pytest.approx(2 / 7) and shared["saved"]["all"] == pytest.approx(2 / 7 * 7 / 8)
    noise = next(row for row in methods(results).values() if row["kind"] == "shared-noise")
    assert noise["saved"] == {"grouped": 0, "all": 0, "own_steps": 0}
    fewer = next((row for row in methods(results).values() if row["steps"] < steps and row["kind"] == "independent"), None)
    assert fewer is None or fewer["saved"]["grouped"] == fewer["saved"]["all"] == pytest.approx(1 - fewer["steps"] / steps)
    assert all(row["denoise_seconds_per_picture"] > 0 and row["denoise_seconds_saved"] is not None for row in methods(results).values())


def test_every_figure_has_an_interval_and_differences(run):
    _, _, results = run
    for row in methods(results).values():
        for spec, metrics in row["metrics"].items():
            names = {"diversity", "vendi", "frechet", "kernel"} | ({"identification", "score"} if spec == "clip:tiny" else set())
            assert names <= set(metrics)
            for name in names:
                figure = metrics[name]
                if name == "frechet" and spec == "clip:blind":
                    assert figure["low"] is figure["high"] is figure["to_reference"]["low"] is None and figure["resamples"] == 0
                else:
                    assert figure["low"] <= figure["value"] <= figure["high"] and figure["resamples"] >= 400
                assert figure["groups"] == 3
                assert ("to_rival" in figure) == (row["rival"] is not None)
                base = methods(results)[results["solvers"][0]["reference"]]["metrics"][spec][name]["value"]
                assert figure["to_reference"]["value"] == pytest.approx(figure["value"] - base, abs=1e-9)
        assert ("moved" in row["metrics"]["clip:tiny"]) == (row["kind"] != "independent")


def test_a_verdict_needs_every_guarded_metric(run):
    _, _, results = run
    solver = results["solvers"][0]
    assert results["guarded"] == ["identification", "score", "frechet", "diversity"]
    for row in solver["methods"]:
        for name, fits in row["within_each"].items():
            best = methods(results)[solver["bars"][name]]
            assert best["steps"] == solver["knee"]["best"].get(name, solver["reference_steps"])
            difference, allowed = row["metrics"]["clip:tiny"][name]["to_bar"], 0.05 * abs(best["metrics"]["clip:tiny"][name]["value"])
            assert fits == (difference["high"] <= allowed if name == "frechet" else difference["low"] >= -allowed)
        assert row["within"] == all(row["within_each"].values())
    fitting = [row for row in solver["methods"]
               if row["within"] and row["saved"]["all"] > 0 and (row["kind"] != "independent" or row["adapter"])]
    assert solver["recommended"] == (max(fitting, key=lambda row: row["saved"]["all"])["key"] if fitting else None)


def test_names_do_not_overclaim(run):
    out, _, results = run
    assert results["metrics"]["clip:tiny"]["frechet"] == "Fréchet distance (projections)"
    assert not re.search(r"\bFID\b|\bKID\b|\bCLIP", (out / "table.md").read_text())


def test_aligned_references_make_a_row_of_real_pictures(run):
    _, _, results = run
    assert results["references"]["pictures"] == 7
    assert {"identification", "score", "diversity"} <= set(results["real"]["clip:tiny"]) and "frechet" not in results["real"]["clip:tiny"]
    assert results["floor"]["clip:tiny"]["frechet"]["what"] == "two halves of the reference pictures, 3 in each, 10 times"
    assert results["references"]["groups"] == 3 and "7 real pictures for 8 features" in results["remarks"][0]


def test_the_table_says_what_its_intervals_and_seconds_are(run):
    out, _, results = run
    text = " ".join((out / "table.md").read_text().split())
    assert "2000 times (the Fréchet distance 400 times; for extractors that do not judge it has none)" in text
    assert "Methods are compared at other numbers, 14 pictures to 7, with which Fréchet distances fall" in text
    assert "each one's first turn does not count" in text and f"Seconds are of {results['runs'][0]['machine']}, and" in text
    assert {row["rival"] for row in results["solvers"][0]["methods"] if row["kind"] == "shared-noise"} == {None}


def test_table_and_plot_come_from_the_results_alone(run, tmp_path):
    out, result, results = run
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    again = parts.sage("evaluate", "--table", out / "results.json", "--out", tmp_path)
    assert again.exit_code == 0 and again.stdout.strip() in result.stdout
    for name in ("table.md", "plot.png"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()
    assert "| independent at 2 steps" in (out / "table.md").read_text()
    assert short_table(read_results(out / "results.json")) == render(str(out / "results.json"), None)


def test_prompts_cannot_break_the_table(run):
    _, _, results = run
    evil = copy.deepcopy(results) | {"remarks": ["a | b\nc"], "command": "sage | x"}
    text = table(evil)
    assert "a \\| b c" in text and all(line.count("|") != 1 for line in text.splitlines() if line.startswith("|"))


def test_prompts_without_a_neighbour_can_be_drawn_too(place, tmp_path):
    """Eight prompts instead of seven; savings are said of the seven and of all eight, as without the eighth."""
    done = evaluate(place, tmp_path / "out", "--all", "--method", "share")
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["prompts"]["evaluated"] == 8 and results["prompts"]["groups"] == 3 and results["references"] is None
    shared = next(row for row in methods(results).values() if row["kind"] == "share")
    assert shared["pictures"] == 16 and shared["saved"]["grouped"] == pytest.approx(2 / 7)
    assert shared["saved"]["all"] == pytest.approx(1 / 4)
    assert "frechet" not in results["guarded"] and results["real"] is None


def test_resuming_gives_the_same_pictures_figures_and_costs(place, tmp_path, monkeypatch):
    """Stopped between two chunks, and between a chunk's pictures and its cost."""
    options = ("--images", place / "photos", "--method", "share", "--method", "fewer-steps")
    monkeypatch.setattr("sage.evaluation.runner.LEAST_CHUNKS", 99)
    small = (*SMALL[:-4], "--images-per-prompt", 5, "--comfortable", 0)
    whole = evaluate(place, tmp_path / "whole", *options, small=small)
    assert whole.exit_code == 0, whole.output

    def stop_after(times, function):
        count = [0]

        def stopping(*args, **kwargs):
            count[0] += 1
            if count[0] > times:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return stopping

    stops = ((2, Runner, "_draw_chunk", ()), (2, runner, "_append", ("--resume",)), (1, Runner, "_draw_chunk", ("--resume",)))
    for times, target, name, resume in stops:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target, name, stop_after(times, getattr(target, name)))
            stopped = evaluate(place, tmp_path / "out", *options, *resume, small=small)
        assert stopped.exit_code == 130 and "--resume makes the rest" in stopped.stderr
    assert evaluate(place, tmp_path / "out", *options, small=small).exit_code == 2  # not empty
    done = evaluate(place, tmp_path / "out", *options, "--resume", small=small)
    assert done.exit_code == 0, done.output
    assert parts.pictures(tmp_path / "out" / "methods") == parts.pictures(tmp_path / "whole" / "methods")
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "out"))
    assert [row["nfe"] for row in methods(one).values()] == [row["nfe"] for row in methods(two).values()]
    assert [row["metrics"] for row in methods(one).values()] == [row["metrics"] for row in methods(two).values()]
    assert len(two["runs"]) == 4 and len(one["runs"]) == 1
    for key, row in methods(two).items():
        rows = {call["chunk"]: call["nfe"] for call in read_manifest(tmp_path / "out" / "methods" / key / "calls.jsonl")}
        assert sum(rows.values()) == row["nfe"]


def test_resume_refuses_other_settings_and_overwrite_starts_anew(place, tmp_path):
    out = tmp_path / "out"
    options = ("--method", "share")
    assert evaluate(place, out, *options).exit_code == 0
    before = parts.pictures(out)
    for changed, said in ((("--max-rows", 32), "max-rows was 64 and is 32"), (("--seed", 3), "seed was 0 and is 3"),
                          (("--guidance-scale", 2), "guidance-scale was 7.5 and is 2.0")):
        refused = evaluate(place, out, *options, *changed, "--resume")
        assert refused.exit_code == 2 and said in refused.stderr
    assert parts.pictures(out) == before
    (out / "notes.txt").write_text("mine")
    (out / "methods" / "mine").mkdir()
    assert evaluate(place, out, "--method", "tree", "--overwrite").exit_code == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert not [name for name in parts.pictures(out / "methods") if "share" in name]
    assert parts.sage("generate", place / "prompts.txt", "--out", out, "--overwrite").exit_code == 2  # no run of generate


def test_resume_may_change_what_is_drawn_and_how_it_is_judged(place, tmp_path, monkeypatch):
    """Another metric, margin, share and extractor, and pictures to compare with: nothing that is there is drawn again."""
    out = tmp_path / "out"
    assert evaluate(place, out, "--method", "share").exit_code == 0
    before = parts.pictures(out / "methods")
    drawn = []
    draw = Runner._draw_chunk
    monkeypatch.setattr(Runner, "_draw_chunk", lambda self, method, *rest: drawn.append(method.key) or draw(self, method, *rest))
    changed = ("--margin", 0.3, "--share", "0.3", "--method", "shared-noise", "--images", place / "photos", "--extractor", "clip:blind")
    done = evaluate(place, out, "--method", "share", *changed, "--resume")
    assert done.exit_code == 0, done.output
    results = json.loads((out / "results.json").read_text())
    assert before.items() <= parts.pictures(out / "methods").items()
    assert drawn and not {key for key in drawn if any(key in name for name in before)} - {results["solvers"][0]["reference"]}
    assert [run["asked"]["margin"] for run in results["runs"]] == [0.05, 0.3] and results["settings"]["margin"] == 0.3
    assert all({"torch", "diffusers"} <= set(run["versions"]) for run in results["runs"])
    assert "frechet" in results["guarded"] and set(results["metrics"]) == {"clip:tiny", "clip:blind"}


def test_resume_refuses_another_vae_and_another_lora_of_the_same_name(place, tmp_path):
    out, other = tmp_path / "out", tmp_path / "model"
    shutil.copytree(place / "style", tmp_path / "style")
    options = ("--method", "share", "--adapter", tmp_path / "style")
    assert evaluate(place, out, *options).exit_code == 0
    pipe = tiny.stable_diffusion()
    parts.lora(pipe, tmp_path / "style", seed=1)
    refused = evaluate(place, out, *options, "--resume")
    assert refused.exit_code == 2 and "wants the LoRA style that the run there had" in refused.stderr
    shutil.copytree(place / "model", other)
    file = next((other / "vae").glob("*.safetensors"))
    save_file({name: weight * 1.5 for name, weight in load_file(file).items()}, file)
    shutil.move(place / "model", tmp_path / "kept")
    try:
        shutil.move(other, place / "model")
        refused = evaluate(place, out, "--method", "share", "--resume")
    finally:
        shutil.rmtree(place / "model")
        shutil.move(tmp_path / "kept", place / "model")
    assert refused.exit_code == 2 and "weights was" in refused.stderr


BAD = {
    "solver": (("--solver", "magic"), "--solver magic: unknown; known solvers: "),
    "method": (("--method", "magic"), "--method magic: unknown; known methods: fewer-steps, "),
    "extractor": (("--extractor", "magic"), "--extractor magic: load_extractor: unknown extractor 'magic'"),
    "pickle": (("--extractor", "inception"), "wanted inception:FILE with a .safetensors file"),
    "pickle file": (("--extractor", "inception:weights.pth"), "convert them once: from sage.evaluation import convert_inception"),
    "twice": (("--extractor", "clip:tiny"), "names one of them twice"),
    "margin 0": (("--margin", 0), "--margin must be in (0, 1)"),
    "margin 1": (("--margin", 1), "--margin must be in (0, 1)"),
    "nan": (("--margin", "nan"), "--margin must be in (0, 1)"),
    "steps": (("--steps", "10,x"), "--steps must be whole numbers such as 20,10,5, got '10,x'"),
    "no steps": (("--steps", "0"), "--steps must be at least 1, got 0"),
    "share": (("--share", "0.2,1.5"), "--share must be in (0, 1), a fraction of the calls, got 1.5"),
    "budget": (("--budget", "0"), "--budget must be in (0, 1)"),
    "similarity": (("--similarity", "-1"), "--similarity must be in (-1, 1], got -1"),
    "images": (("--images", "nowhere"), "--images nowhere: no such folder"),
    "adapter": (("--adapter", "nowhere.safetensors"), "--adapter nowhere.safetensors: no such file or folder"),
    "held out": (("--held-out",), "--held-out chooses among the benchmark's prompts"),
    "seed": (("--seed", -1), "--seed: seed must be a whole number"),
    "limit": (("--limit", 1), "--limit must be at least 2, got 1"),
    "device": (("--device", "magic"), "--device magic: cannot be used here"),
    "both": (("--resume", "--overwrite"), "--overwrite and --resume exclude each other"),
    "no groups": (("--similarity", 0.99999), "fewer than two are evaluated"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_is_drawn(name, place, tmp_path):
    options, said = BAD[name]
    result = evaluate(place, tmp_path / "out", *options, small=())
    assert result.exit_code == 2 and said in result.stderr, result.output
    assert not (tmp_path / "out").exists()


def test_folders_that_hold_something_else_are_refused(place, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    assert "holds is no run of sage (no evaluation.json of one)" in evaluate(place, tmp_path).stderr
    assert "no pictures in it" in evaluate(place, tmp_path / "out", "--images", place / "style").stderr
    (tmp_path / "one").mkdir()
    shutil.copy(place / "photos" / "0.png", tmp_path / "one")
    assert "one picture in it; wanted two at the least" in evaluate(place, tmp_path / "out", "--images", tmp_path / "one").stderr


def test_a_broken_picture_is_found_before_anything_is_drawn(place, tmp_path):
    shutil.copytree(place / "photos", tmp_path / "photos")
    (tmp_path / "photos" / "3.png").write_bytes((place / "photos" / "3.png").read_bytes()[:200])
    refused = evaluate(place, tmp_path / "out", "--images", tmp_path / "photos")
    assert refused.exit_code == 2 and "3.png cannot be read as a picture" in refused.stderr
    assert not (tmp_path / "out" / "methods").exists()


def test_out_prompts_and_extractor_are_asked_for(place):
    assert "--out FOLDER must be given" in parts.sage("evaluate", place / "prompts.txt").stderr
    result = parts.sage("evaluate", place / "prompts.txt", "--out", "x", "--model", place / "model")
    assert result.exit_code == 2 and "--extractor must be given for a model of your own" in result.stderr
    result = parts.sage("evaluate", place / "prompts.txt", "--out", "x", "--model", place / "model", "--extractor", "clip:blind")
    assert result.exit_code == 2 and "this one knows no texts" in result.stderr


@pytest.mark.parametrize("content", ["{", "[]", '{"kind": "other"}'])
def test_a_table_of_something_else_is_refused(content, tmp_path):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(InputError, match="--table"):
        render(str(tmp_path / "results.json"), None)
    assert parts.sage("evaluate", "--table", tmp_path / "none.json").exit_code == 2
