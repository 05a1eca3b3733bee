"""`pytest --support FILE`: what the tests marked `support(column)` showed of each pipeline family, the source of docs/pipelines.md.

A marked test has a fixture `family`, or names its family (and what it showed of it, if that is more than "yes") with
`record_property`. A test that skips writes its reason into the cell.
"""

import json
from importlib.metadata import version
from pathlib import Path

import pytest
from diffusers.models.cache_utils import CacheMixin
from families import FAMILIES

COLUMNS = ("equals a loop written by hand", "rows = plan", "unshared = stock", "disable restores", "compile", "cache", "offload")
COMMAND = "python -m pytest tests/test_families.py tests/test_caches.py --support benchmarks/results/support.json"
SHOWN: dict[tuple[str, str], set[str]] = {}  # (family, column) → yes | no | what was shown | why the test skipped


def pytest_addoption(parser):
    parser.addoption("--support", metavar="FILE", help="write the support matrix of the pipeline families as JSON")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Let the report of a test that stands for a cell say so: it may be made in another process than the matrix."""
    report = yield
    marker = item.get_closest_marker("support")
    if marker is not None and (report.when == "call" or report.outcome != "passed"):
        told = dict(item.user_properties)
        family = told["family"] if "family" in told else item.callspec.params["family"].name
        passed = told.get("shown", "yes")
        shown = {"passed": passed, "failed": "no"}.get(report.outcome) or report.longrepr[2].removeprefix("Skipped: ")
        report.user_properties = [*report.user_properties, ("cell", [family, marker.args[0], shown])]
    return report


def pytest_runtest_logreport(report):
    for name, value in report.user_properties:
        if name == "cell":
            SHOWN.setdefault((value[0], value[1]), set()).add(value[2])


def pytest_sessionfinish(session):
    path = session.config.getoption("--support")
    if path and SHOWN and not hasattr(session.config, "workerinput"):
        about = {name: version(name) for name in ("torch", "diffusers", "transformers")}
        result = {"command": COMMAND, "versions": about, "table": table()}
        Path(path).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def table() -> dict:
    """The matrix as benchmarks/readme_tables.py draws it."""
    rows = [[f.name, f"`{f.pipeline}`", *(cell(f, column) for column in COLUMNS)] for f in FAMILIES]
    return {"columns": ["family", "pipeline", *COLUMNS], "rows": rows}


def cell(family, column: str) -> str:
    """What the tests showed; "no" if one of them failed."""
    shown = SHOWN.get((family.name, column))
    if shown is None:
        return "none in diffusers" if column == "cache" and not takes_a_cache(family.build()) else "not tested"
    return "no" if "no" in shown else ", ".join(sorted(shown))


def takes_a_cache(pipe) -> bool:
    return any(isinstance(component, CacheMixin) for component in pipe.components.values())
