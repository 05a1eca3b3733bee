"""The code in docs/ runs and prints what it says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sage.families import HOW

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = (DOCS / "bring_your_pipeline.md").read_text(encoding="utf-8")


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def test_the_custom_pipeline_runs_and_shares():
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
    assert "[2, 2, 2, 2, 4, 4, 4, 4, 4, 4]" in code
    done = run(code)
    assert done.stdout.splitlines()[-1:] == ["[2, 2, 2, 2, 4, 4, 4, 4, 4, 4]"], done.stdout + done.stderr


def test_without_the_rule_it_says_what_the_page_says():
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1].replace(', rules={"mood": "mean"}', "")
    done = run(code)
    quoted = " ".join(line.removeprefix("> ") for line in PAGE.splitlines() if line.startswith("> "))
    assert done.returncode == 1 and quoted in done.stderr


@pytest.mark.parametrize("rule", HOW)
def test_every_rule_is_explained(rule):
    assert f"| `{rule}` |" in PAGE
