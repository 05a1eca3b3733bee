"""The benchmarks refuse wrong results, and the list of GPU work runs as far as a machine without one lets it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = str(ROOT / "benchmarks")
PIPELINES = ("sd15", "sdxl_512", "sdxl_1024", "sd3_512", "sd3_1024", "flux_512", "flux_1024", "wan_33", "wan_81")


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


def make_gpu(*options):
    command = ["make", "--silent", "gpu", f"PYTHON={sys.executable}", *options]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # another would mostly wait
    return subprocess.run(command, cwd=ROOT, env=one_thread, capture_output=True, text=True)


def test_dry_run_lists_every_step_with_its_limit():
    run = make_gpu("DRY=1")
    assert run.returncode == 0, run.stderr
    limits = dict(re.findall(r"^(\w+) +(\d+) s ", run.stdout, re.MULTILINE))
    before = ["build", "exercise", "tests", "memcheck", "racecheck", "initcheck", "graphs", "ops", "sampling"]
    assert list(limits) == [*before, *PIPELINES, "grouping", "profile"]
    assert all(int(limit) < 9 * 60 for limit in limits.values())


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_are_measured_with_options_that_exist(name, run):
    import bench_pipeline
    import gpu_worklist

    run.quick = False
    (command,) = next(step for step in gpu_worklist.STEPS if step.name == name).commands(run)
    args = bench_pipeline.parse([str(word) for word in command.words[2:]])
    assert len(args.models) == len(args.sizes) == 1 and args.sizes[0] in bench_pipeline.MODELS[args.models[0]].sizes
    assert args.out == str(run.json(name)) and args.seconds < 9 * 60


@pytest.mark.deep
def test_without_a_gpu_the_rest_runs_and_calls_add_up(tmp_path):
    steps = (("build", "exercise"), ("ops", "sampling"), ("sd15",))
    for some in steps:
        run = make_gpu("DEVICE=cpu", "QUICK=1", f"STEPS={' '.join(some)}", f"RESULTS={tmp_path}")
        assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads((tmp_path / "cpu-quick.json").read_text(encoding="utf-8"))
    assert {name: entry["status"] for name, entry in found["steps"].items()} == {
        "build": "skipped", "exercise": "passed", "ops": "passed", "sampling": "passed", "sd15": "passed",
    }  # fmt: skip
    assert found["steps"]["build"]["reason"] == "needs a GPU"
    assert {"ops", "ops-compile", "sampling", "sd15"} <= set(found["tables"])
    ops = found["steps"]["ops"]["result"]
    assert len(ops["lines"]) == 4 and not ops["refused"]
    for line in ops["lines"]:
        assert set(line["us"]) == {"cpu", "diffusers", "torch.compile", "copy"}
        assert all(len(samples) >= 9 for samples in line["raw_us"].values())
    assert (tmp_path / "cpu-quick-ops.png").stat().st_size > 10_000


@pytest.fixture
def run(tmp_path):
    import gpu_worklist

    (tmp_path / "logs").mkdir()
    arguments = type("Arguments", (), {"device": "cpu", "quick": True, "results": str(tmp_path)})
    return gpu_worklist.Run(arguments)


@pytest.mark.parametrize(
    ("code", "limit", "status"),
    [
        ("print('well')", 60, "passed"),
        ("raise SystemExit(3)", 60, "failed with status 3"),
        ("import time; time.sleep(60)", 1, "out of time"),
    ],
)
def test_a_step_says_how_it_ended(run, code, limit, status):
    import gpu_worklist

    commands = lambda run: [gpu_worklist.Command([sys.executable, "-c", code])]  # noqa: E731
    entry = gpu_worklist.perform(gpu_worklist.Step("some", limit, "", commands, needs_gpu=False), run)
    assert entry["status"] == status and entry["seconds"] < 30
    assert code in entry["tail"][0] and (entry["tail"][-1] == "well") == (status == "passed")


def test_a_step_without_its_module_is_skipped(run):
    import gpu_worklist

    step = gpu_worklist.Step("some", 9, "", lambda run: [], needs_gpu=False, modules=("pytest", "no_such_module"))
    assert gpu_worklist.perform(step, run) == {"status": "skipped", "reason": "needs Python's no_such_module"}


@pytest.fixture
def case():
    import ops_cases

    return ops_cases.Case(ops_cases.Key("dpm++2m-sde", "SD", "bf16/fp32", 1, 4), "cpu")


def test_a_right_result_is_timed(case, one_thread):
    with torch.no_grad():
        case.check_ours("auto")
        case.check_diffusers()


@pytest.mark.parametrize("field", ["sample", "denoised", "model_input"])
def test_one_wrong_bit_is_not_timed(case, field, one_thread, monkeypatch):
    import ops_cases

    right = case.branch_step

    def wrong(*args, **options):
        step = right(*args, **options)
        value = getattr(step, field).view(-1)[-1:]
        bits = value.view(torch.int32 if value.dtype.itemsize == 4 else torch.int16)
        bits.bitwise_xor_(1)
        return step

    monkeypatch.setattr(case, "branch_step", wrong)
    with pytest.raises(ops_cases.WrongResult, match="differ"):
        case.check_ours("auto")


def test_bytes_are_what_the_formula_says(case):
    model, state, elements = 2, 4, 4 * 64 * 64
    read, written = 1 * (state * 2 + 2 * model), 4 * (state * 2 + 2 * model)  # x and m1, two outputs; x' and m0, two inputs
    assert case.bytes() == (read + written) * elements


def test_json_keeps_its_values_and_stays_short(tmp_path):
    import harness

    data = {"a": [1.5, 2.25], "text": "[ kept ]\n{ kept }", "nested": {"b": {"median": 1, "p20": 0}, "c": [[1, 2], [3]]}, "none": []}
    harness.write_json(tmp_path / "x.json", data)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == data and '"a": [1.5, 2.25]' in text and '"b": {"median": 1, "p20": 0}' in text


def test_contenders_alternate():
    import harness

    calls = []
    samplers = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    samples = harness.in_turn(samplers, seconds=0, least=3, most=3)
    assert calls == list("ababab") and samples == {"a": [1, 3, 5], "b": [2, 4, 6]}
    assert harness.ratio(samples, "a", "b")["median"] == pytest.approx(4 / 3, rel=1e-3)
