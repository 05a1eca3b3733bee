"""The benchmarks of whole pipelines, in miniature: what they write, what they leave out and why, and how they go on after a stop."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def run_quick(script: str, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, f"benchmarks/{script}", "--quick", *options]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


def arguments(*words: str):
    import bench_pipeline

    return bench_pipeline.parse(["--quick", "--device", "cpu", *words])


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def lines_of(entry: dict) -> dict[str, dict]:
    return {line["method"]: line for line in entry["methods"]}


@pytest.fixture
def job():
    import pipeline_models as models
    from pipeline_methods import Job

    model = models.TINY["flux"]
    pipe = models.build(model, CPU, torch.float32)
    options = {**model.options, **model.sizes["64"]}
    made = Job(pipe, models.conditions(model, 8, CPU, torch.float32), options, model.order, model.copies, model.together, CPU)
    made.batch = 2
    return made


def test_models_in_miniature(tmp_path):
    out = tmp_path / "x.json"
    run = run_quick("bench_pipeline.py", "--models", "sd15", "flux", "--only", "shared", "tree", "native", "cached", "--out", str(out))
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("random weights") >= 1 and "UNet2DConditionModel takes no cache" in run.stdout
    result = read(out)
    assert "pictures do not" in result["note"] and result["environment"]["threads"] == 1
    assert list(result["entries"]) == ["sd15 64", "flux 64"]
    for name, copies in (("sd15 64", 2), ("flux 64", 1)):
        check_entry(result["entries"][name], copies)
    cached = lines_of(result["entries"]["flux 64"])["4s, share 0.4, cached"]
    assert cached["cache"]["name"] == "FirstBlockCache" and 0 < cached["cache"]["computed"] <= 1 and cached["follows"] is None
    assert {line["status"] for line in result["entries"]["sd15 64"]["methods"] if line["kind"] == "cached"} == {
        "skipped: UNet2DConditionModel takes no cache"
    }
    columns = len(result["table"]["columns"])
    assert all(len(row) == columns == len(result["table"]["formats"]) for row in result["table"]["rows"])


def check_entry(entry: dict, copies: int) -> None:
    """Rows and launches of 5 steps are those of the plans, and ratios belong to the seconds beside them."""
    pictures, lines, rows = entry["pictures"], lines_of(entry), entry["batch"]["rows"]
    whole = 5 * pictures * copies
    shares = {0.2: 1, 0.4: 2, 0.6: 3}
    expected = {"stock": 1, "enabled, share 0": 1, "8s, tree": (1 / 8 + 1 / 4 + 3) / 5, "8s, tree, native": (1 / 8 + 1 / 4 + 3) / 5}
    expected |= {f"{group}s, share {share:g}": (calls / group + 5 - calls) / 5 for share, calls in shares.items() for group in (4, 8)}
    expected["4s, share 0.4, native"] = expected["4s, share 0.4"]
    assert entry["status"] == "measured" and entry["steps"] == 5
    for name, part in expected.items():
        line = lines[name]
        assert line["status"] == "measured" and line["finite"] and line["peak_memory_gb"] is None
        assert line["denoiser_rows"] == round(part * whole) and line["nfe"] * copies == line["denoiser_rows"], name
        assert line["launches"] == line["denoiser_rows"] // rows, name  # every launch is full
        assert line["row_ratio"] == pytest.approx(part)
        assert line["time_ratio"] == pytest.approx(line["raw_seconds"][0] / lines["stock"]["raw_seconds"][0], rel=1e-2)
        assert line["time_per_row"] == pytest.approx(line["time_ratio"] / part, rel=1e-2)
        assert line["follows"] == (None if name == "stock" else line["time_per_row"] <= 1.05)


@pytest.mark.deep
def test_all_models_and_methods(tmp_path):
    out = tmp_path / "x.json"
    run = run_quick("bench_pipeline.py", "--models", "sd15", "sdxl", "sd3", "flux", "wan", "--seconds", "1e4", "--out", str(out))
    assert run.returncode == 0, run.stdout + run.stderr
    entries = read(out)["entries"]
    assert list(entries) == ["sd15 64", "sdxl 64", "sd3 64", "flux 64", "wan 64f5"]
    for entry in entries.values():
        reasons = {line["status"] for line in entry["methods"]} - {"measured"}
        assert all("takes no cache" in reason or "need a GPU" in reason for reason in reasons)
        compiled = [line for line in entry["methods"] if line["kind"] == "compiled"]
        assert len(compiled) == 3 and all(line["warm_up_seconds"] > 0 for line in compiled)


@pytest.mark.deep
def test_embedded_model_writes_what_the_readme_is_made_of(tmp_path):
    out = tmp_path / "x.json"
    run = run_quick("bench_pipeline.py", "--threads", "1", "--out", str(out))
    assert run.returncode == 0, run.stdout + run.stderr
    new, committed = read(out), read(ROOT / "benchmarks" / "results" / "cpu_pipeline.json")
    assert set(new) == set(committed) and set(new["settings"]) == set(committed["settings"])
    assert new["table"]["columns"] == committed["table"]["columns"]
    assert [set(row) for row in new["rows"]] == [set(row) for row in committed["rows"]]


@pytest.mark.deep
def test_overhead_in_miniature(tmp_path):
    out = tmp_path / "x.json"
    run = run_quick("bench_overhead.py", "--out", str(out))
    assert run.returncode == 0, run.stdout + run.stderr
    result = read(out)
    assert [line["pictures"] for line in result["overhead"]] == [line["pictures"] for line in result["host"]] == [1, 8]
    for line in result["overhead"]:
        low, high = line["processor"]["interval"]
        assert low <= line["processor"]["overhead"]["median"] <= high
        assert line["within_target"] == (line["processor"]["overhead"]["median"] <= 0.02)
    shared = {line["method"]: line["row_ratio"] for line in result["clock"]}
    assert shared["groups of 4, share 0.4"] == pytest.approx(0.7) and shared["groups of 8, share 0.6"] == pytest.approx(0.475)
    assert len(result["clock"]) == 2 * 7


@pytest.mark.deep
def test_probe_in_miniature(tmp_path):
    out = tmp_path / "x.json"
    run = run_quick("bench_probe.py", "--threads", "1", "--out", str(out))
    assert run.returncode == 0, run.stdout + run.stderr
    new, committed = read(out), read(ROOT / "benchmarks" / "results" / "probe.json")
    assert set(new) == set(committed) and set(new["tables"]) == set(committed["tables"]) == {"deviation", "quality"}
    pairs, calls = len(new["deviation"]["pairs"]), len(new["deviation"]["calls"])
    assert pairs == 4 and [len(row) for row in new["deviation"]["deviations"]] == [calls] * pairs
    probed = [line for line in new["quality"] if "tolerance" in line["method"]]
    assert probed and all(line["probe_rows"] > 0 and 0 <= line["identification"] <= 1 for line in probed)


def test_help_says_what_is_measured(capsys):
    import bench_pipeline

    with pytest.raises(SystemExit):
        bench_pipeline.main(["--help"])
    said = capsys.readouterr().out
    assert "random weights" in said and "--max-rows" in said and "1.05" in said


@pytest.mark.parametrize(
    "words", [["--models", "embedded", "flux"], ["--models", "flux", "--max-rows", "1"], ["--models", "flux2"], ["--groups", "1", "4"]]
)
def test_wrong_options_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        arguments(*words)
    assert "error:" in capsys.readouterr().err


def test_a_call_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    import pipeline_random

    measured = []

    def measure(name, model, pipe, size, *rest):
        measured.append(name)
        if name == "sd3" and len(measured) == 2:
            raise KeyboardInterrupt
        return {"status": "measured", "methods": []}

    monkeypatch.setattr(pipeline_random, "measure", measure)
    args = arguments("--models", "flux", "sd3", "wan", "--resume", "--out", str(tmp_path / "x.json"))
    with pytest.raises(KeyboardInterrupt):
        pipeline_random.run(args)
    assert list(pipeline_random.run(args)["entries"]) == ["flux 64", "sd3 64", "wan 64f5"]
    assert measured == ["flux", "sd3", "sd3", "wan"]
    args.cache_threshold = 0.2  # other settings: measured anew
    pipeline_random.run(args)
    assert measured[4:] == ["flux", "sd3", "wan"]


def test_a_model_that_does_not_fit_is_skipped_with_the_reason(monkeypatch):
    import pipeline_models
    import pipeline_random

    monkeypatch.setattr(pipeline_models, "free_bytes", lambda device: 10e9)
    reason = pipeline_models.refusal(pipeline_models.MODELS["flux"], CPU, torch.bfloat16)
    assert reason == "needs about 30 GB of memory for bfloat16 weights and room to work, 10 GB are free"
    monkeypatch.setattr(pipeline_models, "free_bytes", lambda device: 10)
    result = pipeline_random.run(arguments("--models", "sd15"))
    assert result["entries"]["sd15 64"]["status"].startswith("skipped: needs about")
    assert pipeline_random.skipped(result) and not result["table"]["rows"]


def test_a_size_that_does_not_fit_or_exist_is_skipped(monkeypatch):
    import pipeline_random

    def measure(*args):
        raise torch.OutOfMemoryError("not even 1 pictures fit")

    monkeypatch.setattr(pipeline_random, "measure", measure)
    args = arguments("--models", "sd15")
    args.sizes = ["64", "1024"]
    entries = pipeline_random.run(args)["entries"]
    assert entries["sd15 64"] == {"status": "skipped: out of memory: not even 1 pictures fit"}
    assert entries["sd15 1024"] == {"status": "skipped: sd15 is measured at 64"}


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "wan"])
def test_sizes_are_the_real_ones(name):
    import pipeline_models

    billions = {"sd15": 0.860, "sdxl": 2.567, "sd3": 2.028, "flux": 11.901, "wan": 1.419}
    assert pipeline_models.parameters(pipeline_models.MODELS[name]) / 1e9 == pytest.approx(billions[name], abs=5e-4)


def test_a_method_that_breaks_does_not_cost_the_others(job, monkeypatch):
    import pipeline_random
    from pipeline_methods import Job, methods

    run, args = Job.run, arguments("--models", "flux", "--only", "native")

    def broken(self, method, pictures, steps):
        if method.engine == "native":
            raise ValueError("no")
        return run(self, method, pictures, steps)

    monkeypatch.setattr(Job, "run", broken)
    lines = pipeline_random.rounds(job, methods([0.4], [4], ["native"]), 8, 2, args, "x")
    assert [line["status"] for line in lines] == ["measured", "failed: ValueError: no"]
    assert pipeline_random.failed({"entries": {"x": {"methods": lines}}}) == ["x, 4s, share 0.4, native: failed: ValueError: no"]


@pytest.mark.parametrize(
    ("seconds", "wanted"),
    [
        ({1: 1.0, 2: 1.2, 4: 2.0, 8: 3.95}, 4),  # 8 brings 1 % more
        ({1: 1.0, 2: 1.2, 4: None}, 2),  # memory is out
        ({1: 1.0, 2: 2.1}, 1),
    ],
)
def test_the_best_batch_is_the_smallest_that_fills_the_device(job, seconds, wanted, monkeypatch):
    import pipeline_random

    def run(method, pictures, steps):
        if seconds[pictures] is None:
            raise torch.OutOfMemoryError
        return {"seconds": seconds[pictures]}

    monkeypatch.setattr(job, "run", run)
    args = arguments("--models", "flux")
    args.quick, job.batch = False, 1
    trials = pipeline_random.find_batch(job, args)
    assert job.batch == trials[-1]["pictures"] == wanted


def test_max_rows_are_taken_as_they_are(job):
    import pipeline_random

    args = arguments("--models", "flux", "--max-rows", "6")
    assert [trial["pictures"] for trial in pipeline_random.find_batch(job, args)] == [6] and job.max_rows == 6


def test_less_is_timed_where_time_is_short():
    import pipeline_random
    from pipeline_methods import methods

    args, chosen = arguments("--models", "flux"), methods([0.2, 0.4, 0.6], [4, 8])
    args.steps = 10
    assert pipeline_random.settle(0.001, 2, chosen, args) == (10, 16)
    assert pipeline_random.settle(0.05, 2, chosen, args) == (5, 16)
    assert pipeline_random.settle(10.0, 2, chosen, args) == (5, 8)


def test_job_leaves_the_pipeline_as_it_was(job):
    from pipeline_methods import Method

    job.compile(whole=True, backend="eager", dynamic=False)
    for method in (Method("a", "stock", compiled=True), Method("b", "native", 0.5, 4, compiled=True)):
        job.run(method, 8, 2)
        assert job.denoiser._compiled_call_impl is None
        assert "encode_prompt" not in vars(job.pipe) and "_sage_sharing" not in vars(job.pipe)


def test_engines_draw_the_same(job):
    from pipeline_methods import Method

    plain, hook, native = (job._call(Method("x", engine, 0.5, 4), range(8), 4)[0] for engine in ("stock", "hook", "native"))
    apart = job._call(Method("x", "hook"), range(8), 4)[0]
    assert torch.allclose(hook, native, atol=1e-4) and torch.allclose(apart, plain, atol=1e-4)
    assert not torch.allclose(hook, plain, atol=1e-2)
