"""`sage evaluate --quick` on the embedded model and its benchmark, on a few prompts."""

import json

import pytest
from evaluation_parts import sage

pytestmark = pytest.mark.usefixtures("one_thread")


def test_quick_on_the_embedded_model(tmp_path):
    out = tmp_path / "out"
    options = ("--limit", 6, "--images-per-prompt", 1, "--steps", "3,2", "--share", "0.4", "--method", "share", "--method", "fewer-steps")
    result = sage("evaluate", "--out", out, "--quick", "--device", "cpu", *options)
    assert result.exit_code == 0, result.output
    results = json.loads((out / "results.json").read_text())
    assert results["metrics"]["emoji"]["frechet"] == "Fréchet distance (emoji scorer)"
    assert results["real"]["emoji"]["frechet"]["value"] == results["floor"]["emoji"]["frechet"]["value"]
    assert "held out" not in results["prompts"]["source"] and results["prompts"]["read"] > 100
    assert results["settings"]["quick"] and results["small"] in result.stdout
    assert {"independent", "share"} == {row["kind"] for row in results["solvers"][0]["methods"]}
    assert "recommended default: " in result.stdout.lower()
