"""The README says what the measurements say, and its commands and names exist."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

import sage
from sage.cli import cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "benchmarks" / "readme_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_agree_with_the_measurements(tables):
    for path, text in tables.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}; run: python benchmarks/readme_tables.py"
    assert tables.BLOCK.search(README)


def test_floors_are_what_the_command_computes(monkeypatch):
    """The one table that is arithmetic can be made again here."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import kernel_floors

    assert json.loads((ROOT / "benchmarks/results/kernel_floors.json").read_text())["table"] == json.loads(json.dumps(kernel_floors.table()))


def test_a_block_is_filled_and_stays(tables, tmp_path):
    (tmp_path / tables.RESULTS).mkdir(parents=True)
    data = {"table": {"columns": ["solver", "saved"], "rows": [["a|b", 0.2512], ["c", None]], "formats": [None, ".1%"]}}
    (tmp_path / tables.RESULTS / "x.json").write_text(json.dumps(data))
    text = tables.filled("before\n<!-- table:x -->\n<!-- /table -->\nafter\n", tmp_path)
    assert "| a\\|b | 25.1% |\n| c | – |" in text and text.startswith("before\n") and text.endswith("\nafter\n")
    assert tables.filled(text, tmp_path) == text
    assert "Not measured yet" in tables.filled("<!-- table:y -->\n<!-- /table -->", tmp_path)


def test_a_file_may_hold_several_tables(tables, tmp_path):
    (tmp_path / tables.RESULTS).mkdir(parents=True)
    data = {"tables": {"second": {"columns": ["solver"], "rows": [["ddim"]]}}}
    (tmp_path / tables.RESULTS / "x.json").write_text(json.dumps(data))
    text = tables.filled("<!-- table:x:second -->\n<!-- /table -->\n", tmp_path)
    assert "| ddim |" in text and tables.filled(text, tmp_path) == text
    with pytest.raises(ValueError, match='wanted a key "third"'):
        tables.filled("<!-- table:x:third -->\n<!-- /table -->\n", tmp_path)


def test_a_ragged_table_is_refused(tables):
    with pytest.raises(ValueError, match="wanted 2 values"):
        tables.markdown_table(["a", "b"], [[1]])


def test_named_files_and_functions_exist():
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"sage\.([A-Za-z_]+)\(", README):
        assert hasattr(sage, name), name


def test_options_in_the_readme_exist():
    shown = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", "\n".join(re.findall(r"^\s+sage .*$", README, re.MULTILINE))))
    helped = "".join(CliRunner().invoke(cli, [command, "--help"]).output for command in ("info", "plan", "generate", "evaluate", "train", "cache"))
    assert shown and all(option in helped for option in shown), shown
