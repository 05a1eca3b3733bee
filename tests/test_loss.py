"""The loss table: its shape is checked, interpolated, fitted, and kept by a file."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sage
from sage.loss import LossTable

GRID = np.array([0.0, 0.5, 1.0])
LOSS = np.array([[0.0, 0.3, 0.9], [0.0, 0.1, 0.3], [0.0, 0.0, 0.0]])


def changed(row: int, column: int, value: float) -> np.ndarray:
    loss = LOSS.copy()
    loss[row, column] = value
    return loss


def test_between_the_values_it_is_bilinear_and_below_the_first_similarity_constant():
    table = LossTable(GRID, GRID, LOSS)
    assert table(0.0, 0.5) == 0.3 and table(1.0, 1.0) == 0.0 and table(0.3, 0.0) == 0.0
    assert table(0.25, 0.75) == pytest.approx((0.3 + 0.9 + 0.1 + 0.3) / 4)
    assert table(-0.7, 1.0) == table(0.0, 1.0) and table(1.0000001, 0.5) == 0.0
    assert table(GRID[:, None], GRID).shape == (3, 3) and (table(GRID[:, None], GRID) == LOSS).all()


@pytest.mark.parametrize("loss, message", [
    (changed(1, 1, -0.1), r"loss\[1, 1\] = -0.1 \(similarity 0.5, share 0.5\) must be at least 0"),
    (changed(1, 0, 0.1), r"loss\[1, 0\] .* must be 0, as nothing is shared"),
    (changed(2, 2, 0.1), r"loss\[2, 2\] .* must be 0, as the prompts are alike"),
    (changed(1, 1, 0.4), r"loss\[1, 1\] .* must not be above that of the next lower similarity"),
    (changed(1, 2, 0.05), r"loss\[1, 2\] .* must not be below that of the share before it"),
    (changed(1, 1, 0.2), r"loss\[1, 1\] .* convex in share"),
    (changed(1, 2, 0.8), r"loss\[0, 1\] .* what a similarity loses more than the next must be convex in share"),
    (changed(1, 1, np.nan), r"loss\[1, 1\] must be finite"),
    (LOSS[:2], r"loss must be \[3, 3\]"),
    ([[0.0, 1.0], [0.0]], "loss must be numbers in rows of one length"),
])  # fmt: skip
def test_another_shape_is_refused_by_the_place(loss, message):
    with pytest.raises(ValueError, match=message):
        LossTable(GRID, GRID, loss)


@pytest.mark.parametrize("similarity, share, message", [
    ([0.0, 1.0, 0.5], GRID, r"similarity\[2\] does not rise"),
    ([0.0, 0.5, 0.9], GRID, "similarity must begin at -1 or above and end with 1"),
    ([1.0], GRID, "similarity must be at least two values"),
    (GRID, [0.1, 0.5, 1.0], "share must begin with 0"),
    (GRID, [0.0, 0.5, 0.9], "share must begin at 0 or above and end with 1"),
    (GRID, [-0.5, 0.5, 1.0], "share must begin at 0 or above and end with 1"),
])  # fmt: skip
def test_another_axis_is_refused(similarity, share, message):
    with pytest.raises(ValueError, match=message):
        LossTable(similarity, share, LOSS)


def test_other_types_are_refused():
    with pytest.raises(TypeError, match="loss must be a sequence"):
        LossTable(GRID, GRID, 3.0)
    with pytest.raises(TypeError, match="provenance must be a dict"):
        LossTable(GRID, GRID, LOSS, "by hand")
    table = LossTable(GRID, GRID, LOSS)
    with pytest.raises(ValueError, match="share must be in"):
        table(0.5, 1.1)
    with pytest.raises(ValueError, match="got NaN"):
        table(np.nan, 0.5)
    with pytest.raises(ValueError):
        table.loss[0, 0] = 1.0


@given(k=st.floats(1e-6, 100), a=st.floats(0.05, 5), b=st.floats(1, 6))
@settings(max_examples=80, deadline=None)
def test_the_power_law_is_a_valid_table_and_is_fitted(k, a, b):
    table = LossTable.power(k, a, b)
    assert table(0.0, 1.0) == pytest.approx(k)
    similarity, share = (values.ravel() for values in np.meshgrid(np.linspace(-0.2, 1, 13), np.linspace(0.1, 1, 10)))
    found = LossTable.fit(similarity, share, k * (1 - similarity) ** a * share**b).provenance
    assert [found["k"], found["a"], found["b"]] == pytest.approx([k, a, b], rel=1e-3)
    assert found["samples"] == 130 and found["residual"] < 1e-3 * k


def test_the_fit_sees_through_noise_and_keeps_the_shape():
    rng = np.random.default_rng(0)
    similarity, share = rng.uniform(0, 1, 20000), rng.uniform(0, 1, 20000)
    found = LossTable.fit(similarity, share, 0.2 * (1 - similarity) ** 1.5 * share**2 + 0.1 * rng.standard_normal(20000), {"by": "test"})
    assert [found.provenance[key] for key in "kab"] == pytest.approx([0.2, 1.5, 2.0], rel=0.15)
    assert found.provenance["residual"] == pytest.approx(0.1, rel=0.05) and found.provenance["by"] == "test"
    concave = LossTable.fit(similarity, share, (1 - similarity) * np.sqrt(share))
    assert concave.provenance["b"] == 1.0


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(ValueError, match="does not at all"):
        LossTable.fit([0.1, 0.2, 0.3], [0.5, 0.5, 0.5], [-0.1, 0.0, -0.2])
    with pytest.raises(ValueError, match="of one length, 3 or more, got 2, 2 and 2"):
        LossTable.fit([0.1, 0.2], [0.5, 0.5], [0.1, 0.0])
    with pytest.raises(ValueError, match=r"share in \[0, 1\]"):
        LossTable.fit([0.1, 0.2, 0.3], [0.5, 0.5, 5.0], [0.1, 0.0, 0.2])
    with pytest.raises(ValueError, match="b at least 1"):
        LossTable.power(1.0, 1.0, 0.5)


def test_a_file_keeps_it(tmp_path):
    table = LossTable.power(0.123456789, 1.1, 1.7, {"model": "märchen", "seeds": [0, 1]})
    table.save(tmp_path / "table.json")
    again = LossTable.load(tmp_path / "table.json")
    for name in ("similarity", "share", "loss"):
        assert (getattr(again, name) == getattr(table, name)).all()
    assert again.provenance == table.provenance
    data = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    for broken, message in (({**data, "version": 9}, "of version 1"), ([], "of version 1"), ({**data, "loss": [[0]]}, "loss must be"),
                            ({key: data[key] for key in data if key != "share"}, "must hold share")):  # fmt: skip
        (tmp_path / "broken.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=message):
            LossTable.load(tmp_path / "broken.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="broken.json must be JSON"):
        LossTable.load(tmp_path / "broken.json")


def test_the_shipped_table_says_where_it_is_from():
    table = LossTable.default()
    assert table is LossTable.default()
    assert {"command", "model", "encoder", "seeds", "samples", "unit", "k", "a", "b", "residual", "intervals"} <= set(table.provenance)
    assert table(0.3, 0.8) > table(0.8, 0.8) > 0 and table(0.3, 0.8) > table(0.3, 0.4) > 0


def test_the_benchmark_fits_what_it_measures(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    import fit_loss

    def measured(pairs, args):
        rng = np.random.default_rng(0)
        cosines = np.array([float(embeddings[a] @ embeddings[b]) for a, b in pairs])
        lost = 0.5 * (1 - cosines[:, None]) ** 1.5 * np.array(args.shares) ** 2
        return np.full((2, len(pairs)), 0.4), np.stack([lost, 2 * lost]) + 1e-3 * rng.standard_normal((2, *lost.shape))

    captions = [scene.caption for scene in fit_loss.benchmark()]
    embeddings = dict(zip(captions, sage.embed_prompts(captions).vectors, strict=True))
    monkeypatch.setattr(fit_loss, "measure", measured)
    out, written = tmp_path / "loss.json", tmp_path / "table.json"
    assert fit_loss.main(["--pairs", "5", "--quick", "--measure", "margin", "--out", str(out), "--table", str(written)]) == 0
    table, result = LossTable.load(written), json.loads(out.read_text(encoding="utf-8"))
    assert [table.provenance[key] for key in "kab"] == pytest.approx([1.0, 1.5, 2.0], rel=0.1)
    assert [result["fits"]["cosine"][key] for key in "kab"] == pytest.approx([0.5, 1.5, 2.0], rel=0.1)
    low, high = result["fits"]["margin"]["intervals"]["k"]
    assert low <= result["fits"]["margin"]["k"] <= high
    assert all(0.2 <= row["similarity"][0] < 1 and row["pairs"] == 2 for row in result["fits"]["cosine"]["bins"])
    assert fit_loss.main(["--again", str(out), "--quick", "--measure", "cosine", "--out", str(out), "--table", str(written)]) == 0
    assert json.loads(out.read_text(encoding="utf-8")) == result | {"measure": "cosine", "table": result["tables"]["cosine"]}
    assert LossTable.load(written).provenance["k"] == pytest.approx(result["fits"]["cosine"]["k"], rel=1e-3)
    assert "environment" in result and result["tables"]["cosine"]["columns"][0] == "cosine" and len(result["raw"]["pairs"][0]) == 9
