"""What docs/quality.md is made of: cells, choices and noise levels, from a table of three methods."""

import importlib.util
import math
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def quality_tables():
    spec = importlib.util.spec_from_file_location("quality_tables", ROOT / "benchmarks" / "quality_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def estimate(value, **differences):
    return {"value": value, "low": value - 0.1, "high": value + 0.1, **{name: estimate(of) for name, of in differences.items()}}


def row(key, kind, steps, value=None, rows=20.0, calls=0, rival=None, fits=True, **differences):
    names = ("identification", "score", "frechet", "kernel", "diversity", "vendi")
    return {"key": key, "label": kind if value is None else f"{kind} {value}", "kind": kind, "steps": steps, "value": value, "adapter": None,
            "shares": kind == "share", "shared_calls": [0, calls], "num_calls": steps, "rows_per_picture": rows, "rival": rival,
            "saved": {"grouped": 1 - rows / 20, "all": (1 - rows / 20) / 2, "own_steps": 0.0}, "denoise_seconds_saved": 0.1,
            "within": fits, "within_each": {"identification": fits},
            "metrics": {name: estimate(0.8, **differences) for name in names}}


@pytest.fixture
def told():
    methods = [row("a", "independent", 10), row("b", "independent", 8, rows=16.0),
               row("c", "share", 10, 0.4, rows=15.0, calls=4, rival="b", fits=False, to_rival=-0.2, to_own=-0.3)]
    return {"solver": "DDIM", "settings": {"solver": ["dpm++2m"]}, "knee": {"steps": 10}, "reference": "a", "reference_steps": 10,
            "recommended": "b", "recommended_sharing": None, "methods": methods, "real": {"identification": estimate(0.95)},
            "floor": {"frechet": estimate(1.5)}}


def test_tables_say_what_was_measured(quality_tables, told):
    level = [-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    made = quality_tables.tables([told], {("DDIM", 10): level})
    assert set(made) == {"choice", "real", "dpmpp2m", "dpmpp2m-rival", "sweep"}
    assert made["choice"]["rows"] == [["DDIM", "10", "independent, 8 steps", 1 - 16 / 20, (1 - 16 / 20) / 2, "none", None, None]]
    assert made["real"]["rows"][0][1:4] == ["0.950 [0.850, 1.050]", None, "1.50 [1.40, 1.60]"]
    reference, _, shared = made["dpmpp2m"]["rows"]
    assert reference[0] == "independent, 10 steps (reference)" and reference[-1] == "yes"
    assert shared[5] == "0.800 [0.700, 0.900] ✗" and shared[6] == "0.8 [0.7, 0.9]" and shared[-1] == "no"
    assert made["dpmpp2m-rival"]["rows"] == [["share 0.4, 10 steps", 15.0, "independent, 8 steps", 16.0, "-0.200 [-0.300, -0.100]",
                                              "-0.2 [-0.3, -0.1]", "-0.20 [-0.30, -0.10]", "-0.20 [-0.30, -0.10]"]]
    assert made["sweep"]["rows"][0][:5] == ["DDIM, 10", 0.4, "4 of 10", 0.0, 0.5]
    for table in made.values():
        assert all(len(line) == len(table["columns"]) for line in table["rows"])


def test_the_cosine_schedule_is_that_of_its_paper(quality_tables):
    """alpha_bar(t) = cos²(π t / 2) at time t, of which steps that are even in time have taken 1 − t."""
    for time in (0.1, 0.35, 0.5, 0.9):
        alpha_bar = math.cos(math.pi * time / 2) ** 2
        assert quality_tables.cosine_share(math.log(alpha_bar / (1 - alpha_bar))) == pytest.approx(1 - time)
