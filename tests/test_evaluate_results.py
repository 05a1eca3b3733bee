"""Verdicts, rivals and seconds, from figures and costs that are made up."""

import json
from types import SimpleNamespace

import evaluation_parts as parts
import numpy as np
import pytest

from sage.evaluation.asked import Source, ask
from sage.evaluation.command import Evaluation
from sage.evaluation.folder import EvaluationFolder
from sage.evaluation.knee import Measurement, find_knee
from sage.evaluation.methods import Method
from sage.evaluation.report import COMPARISONS
from sage.evaluation.request import Request
from sage.evaluation.results import SolverResults, sentence
from sage.evaluation.runner import clocked
from sage.prompts import PromptSet

NAMES = {"identification": True, "score": True, "frechet": False, "diversity": True, "vendi": None}
BASE = np.random.default_rng(0).normal(1.0, 0.05, 40)
GROUPS = [[4 * k, 4 * k + 1, 4 * k + 2, 4 * k + 3] for k in range(10)]
ALONE = {steps: Method("independent", steps) for steps in (20, 10, 8)}


class Judge:
    """Metrics of each method that are all one number times a set of pictures, so that differences have narrow intervals."""

    names = ("emoji", "clip:other")

    def __init__(self, scores, **others):
        self.scores, self.others = scores, others

    def measure(self, method, spec):
        values = {name: self.others.get(name, self.scores)[method] for name in NAMES}
        return {name: Measurement(BASE / BASE.mean() * value, GROUPS, NAMES[name], 200) for name, value in values.items()}

    def moved(self, *args):
        return Measurement(BASE, GROUPS, None, 200)

    moved_pixels = moved


@pytest.fixture
def asked(monkeypatch):
    parts.patch(monkeypatch)
    source = Source(PromptSet("test", tuple(parts.PROMPTS)))
    return ask(source, images=2, seed=0, similarity=0.6, max_group_size=8, limit=None, everyone=False)


def write_calls(folder, method, rows, phase="methods", run="now", seconds=(9.0, 2.0, 2.0)):
    """Chunks of 10 pictures with so many denoiser rows for all pictures."""
    with open(folder.method(method.key) / "calls.jsonl", "a") as file:
        for chunk, time in enumerate(seconds):
            cost = {"nfe": rows * 10, "guidance_copies": 2, "denoise_seconds": time, "seconds": 2 * time, "cache": None}
            about = {"phase": phase, "chunk": chunk, "run": run, "pictures": 10, "num_calls": method.steps, "branch_calls": [0]}
            file.write(json.dumps(about | cost) + "\n")


def results(tmp_path, asked, judge, others, margin=0.05):
    """Of independent sampling at 20, 10 and 8 steps, and other methods with so many rows per picture."""
    folder = EvaluationFolder(tmp_path / "out")
    folder.prepare()
    knee = find_knee({steps: {name: judge.measure(method, "emoji")[name] for name in ("identification", "score", "frechet")}
                      for steps, method in ALONE.items()}, margin)
    reference = ALONE[knee.steps or 20]
    for steps, method in ALONE.items():
        write_calls(folder, method, steps, "grid")
    write_calls(folder, reference, reference.steps, seconds=(20.0, 4.0, 4.0))
    for method, rows in others.items():
        write_calls(folder, method, rows)
    runner = SimpleNamespace(folder=folder, unavailable={}, progress=False)
    made = SolverResults("DDIM", [*ALONE.values(), *others], knee, reference, asked, judge, runner, margin)
    return made, made.as_json(), folder


def by_key(told, method):
    return next(row for row in told["methods"] if row["key"] == method.key)


SHARE, TREE, CACHE = Method("share", 10, value=0.2), Method("tree", 10, value=0.8), Method("cache", 10, value=0.1)


def test_one_bar_for_the_knee_and_all_methods(tmp_path, asked):
    """20 steps are best, 10 are 4 % worse and the knee; what is 4 % worse than the knee is 8 % worse than the best."""
    scores = {ALONE[20]: 30.0, ALONE[10]: 28.8, ALONE[8]: 27.6, SHARE: 27.7, TREE: 28.6}
    distances = dict.fromkeys(scores, 1.0)
    _, told, _ = results(tmp_path, asked, Judge(scores, frechet=distances), {SHARE: 8.0, TREE: 9.0})
    assert told["knee"]["steps"] == told["reference_steps"] == 10
    assert told["bars"] == {"identification": ALONE[20].key, "score": ALONE[20].key, "frechet": ALONE[8].key, "diversity": ALONE[10].key}
    for method, fits in ((ALONE[20], True), (ALONE[10], True), (ALONE[8], False), (SHARE, False), (TREE, True)):
        row = by_key(told, method)
        assert row["within"] is fits and row["within_each"]["score"] is fits
        assert row["metrics"]["emoji"]["score"]["to_bar"]["value"] == pytest.approx(scores[method] - 30)
    assert by_key(told, SHARE)["within_each"] == {"identification": False, "score": False, "frechet": True, "diversity": True}
    assert "to_bar" not in by_key(told, SHARE)["metrics"]["clip:other"]["score"] and "to_bar" in COMPARISONS
    assert told["recommended"] == told["recommended_sharing"] == TREE.key
    said = sentence(told, 0.05, ["identification", "score", "frechet", "diversity"])
    assert "within 5% of the best that independent sampling has, and diversity within 5% of the reference's, intervals included" in said


def test_more_diversity_than_the_reference_is_no_aim(tmp_path, asked):
    scores = dict.fromkeys((*ALONE.values(), SHARE, TREE), 1.0)
    diversity = scores | {ALONE[20]: 2.0, ALONE[8]: 0.9, TREE: 0.5}
    _, told, _ = results(tmp_path, asked, Judge(scores, diversity=diversity), {SHARE: 8.0, TREE: 9.0})
    assert told["knee"]["steps"] == 8 and told["bars"]["diversity"] == ALONE[8].key
    assert by_key(told, SHARE)["within"] and not by_key(told, TREE)["within_each"]["diversity"]


def test_fewer_steps_than_the_knee_are_never_recommended(tmp_path, asked):
    """Nine steps, drawn as a rival, would pass; they tell of a finer grid and not of a way to save."""
    nine = Method("independent", 9)
    scores = {ALONE[20]: 1.0, ALONE[10]: 0.99, ALONE[8]: 0.5, nine: 0.99, SHARE: 0.5}
    _, told, _ = results(tmp_path, asked, Judge(scores, frechet=dict.fromkeys(scores, 1.0)), {nine: 9.0, SHARE: 9.0})
    assert by_key(told, nine)["within"] and by_key(told, nine)["saved"]["all"] > 0
    said = []
    fake = SimpleNamespace(request=Request(out="x", steps=(20, 10, 8)), _remark=said.append)
    Evaluation._remark_on_knee(fake, told)
    assert said[0].startswith("DDIM: 9 steps, which --steps did not have, are within the margin too")
    assert told["recommended"] is None and "recommended default: none" in sentence(told, 0.05, ["score", "diversity"])


def test_a_rival_has_nearly_equal_rows_or_there_is_none(tmp_path, asked):
    scores = dict.fromkeys((*ALONE.values(), SHARE, TREE, CACHE), 1.0)
    _, told, _ = results(tmp_path, asked, Judge(scores), {SHARE: 8.8, TREE: 6.0, CACHE: 9.1})
    rivals = {kind: by_key(told, method)["rival"] for kind, method in (("share", SHARE), ("tree", TREE), ("cache", CACHE))}
    assert rivals == {"share": ALONE[8].key, "tree": None, "cache": ALONE[10].key}
    assert all("to_rival" not in of for of in by_key(told, TREE)["metrics"]["emoji"].values())
    assert by_key(told, SHARE)["metrics"]["emoji"]["score"]["to_rival"]["value"] == 0


def test_seconds_leave_first_chunks_out_and_compare_the_same_turns(tmp_path, asked):
    scores = dict.fromkeys((*ALONE.values(), SHARE), 1.0) | {ALONE[8]: 0.5}
    made, told, folder = results(tmp_path, asked, Judge(scores, frechet=dict.fromkeys(scores, 1.0)), {SHARE: 9.0})
    reference, share = by_key(told, ALONE[10]), by_key(told, SHARE)
    assert reference["phase"] == "methods" and reference["denoise_seconds_per_picture"] == pytest.approx(0.4)
    assert share["denoise_seconds_per_picture"] == pytest.approx(0.2) and share["denoise_seconds_saved"] == pytest.approx(0.5)
    assert share["seconds_saved"] == pytest.approx(0.5) and reference["seconds_saved"] == 0
    assert by_key(told, ALONE[20])["phase"] == "grid" and by_key(told, ALONE[20])["denoise_seconds_saved"] == 0
    assert list(clocked(folder, SHARE, "methods", warm=True)) == [("now", 1), ("now", 2)]


def test_seconds_of_another_run_are_not_compared(tmp_path, asked):
    """It may have been on another machine. A single chunk is its own first one, and counts."""
    late, only = Method("share", 10, value=0.3), Method("share", 10, value=0.4)
    scores = dict.fromkeys((*ALONE.values(), SHARE, late, only), 1.0) | {ALONE[8]: 0.5}
    made, _, folder = results(tmp_path, asked, Judge(scores, frechet=dict.fromkeys(scores, 1.0)), {SHARE: 9.0})
    write_calls(folder, late, 9.0, run="later")
    write_calls(folder, only, 9.0, run="last", seconds=(3.0,))
    write_calls(folder, ALONE[10], 10.0, run="last", seconds=(6.0,))
    found = made._seconds(late)
    assert found["denoise_seconds_per_picture"] == pytest.approx(0.2) and found["denoise_seconds_saved"] is None
    assert made._seconds(only)["denoise_seconds_saved"] == pytest.approx(0.5)
