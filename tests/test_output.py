"""Names, atomic writes and manifests."""

import io
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sage.output import (
    PICTURE_NAME,
    OutputFolder,
    PictureSeries,
    digest,
    picture_name,
    plain,
    png_bytes,
    read_manifest,
    slug,
    to_json,
    write_atomic,
)
from sage.prompts import InputError

PROMPTS = ["a fox", "../../etc/passwd", "Füchse & <Hasen>", "🦊"]


def picture(level: int = 0) -> Image.Image:
    return Image.new("RGB", (8, 8), (level, 0, 0))


def record(index: int, **more) -> dict:
    return {"index": index, "prompt": PROMPTS[index], "negative_prompt": None, "seed": 7 + index, "group": 0, **more}


def series(tmp_path: Path, folder: str = "images") -> PictureSeries:
    return PictureSeries(tmp_path, folder, PROMPTS, {"model": "none"})


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("A red Fox, running!", "a-red-fox-running"),
        ("../../etc/x", "etc-x"),
        ("C:\\Windows\\con", "c-windows-con"),
        ("Füchse", "fuchse"),
        ("🦊", "image"),
        ("狐狸", "image"),
        ("-rf *", "rf"),
        ("x" * 500, "x" * 48),
    ],
)
def test_slug(prompt, wanted):
    assert slug(prompt) == wanted


@given(st.text(max_size=600), st.integers(0, 10**7))
def test_names_never_leave_the_folder(prompt, index):
    name = picture_name(index, prompt)
    assert PICTURE_NAME.fullmatch(name) and Path(name).name == name and len(name) < 80


def test_write_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    write_atomic(path, "old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["file.txt"]


def test_write_replaces_a_link_and_not_what_it_points_to(tmp_path):
    (tmp_path / "outside.txt").write_text("precious")
    (tmp_path / "link.txt").symlink_to(tmp_path / "outside.txt")
    write_atomic(tmp_path / "link.txt", "new")
    assert (tmp_path / "outside.txt").read_text() == "precious" and (tmp_path / "link.txt").read_text() == "new"


def test_plain_data():
    value = {"a": np.float32(0.5), "b": np.arange(2), 3: (math.nan, math.inf, None), "p": Path("x"), "t": True}
    assert plain(value) == {"a": 0.5, "b": [0, 1], "3": [None, None, None], "p": "x", "t": True}
    assert json.loads(to_json(value)) == plain(value)


def test_digest_tells_prompts_apart():
    assert digest([["a", "b"], None]) != digest([["a"], ["b"]]) and digest(("a",)) == digest(["a"])


def test_png_text_is_unicode_and_repeatable():
    prompt = "Füchse 🦊 and\na line"
    data = [png_bytes(picture(), record(0) | {"prompt": prompt}, {"model": "m"}) for _ in range(2)]
    assert data[0] == data[1]
    with Image.open(io.BytesIO(data[0])) as read:
        assert read.text["prompt"] == prompt and json.loads(read.text["sage"])["model"] == "m"


def test_series_writes_and_loads_again(tmp_path):
    first = series(tmp_path)
    first.add([2, 0], [picture(2), picture(0)], [record(2), record(0, similarity_to_trunk=math.nan)])
    rows = read_manifest(tmp_path / "manifest.jsonl")
    assert [row["index"] for row in rows] == [2, 0] and rows[1]["similarity_to_trunk"] is None
    assert first.missing == [1, 3]
    second = series(tmp_path)
    second.load()
    assert second.missing == [1, 3]
    second.add([0, 1, 3], [picture(99), picture(1), picture(3)], [record(0), record(1), record(3)])
    assert [row["index"] for row in second.finish()] == [0, 1, 2, 3]
    with Image.open(tmp_path / second.names[0]) as kept:
        assert kept.getpixel((0, 0)) == (0, 0, 0)  # what was finished is not written again


def test_load_takes_only_whole_and_unchanged_pictures(tmp_path):
    first = series(tmp_path)
    first.add(range(4), map(picture, range(4)), map(record, range(4)))
    (tmp_path / first.names[0]).unlink()
    (tmp_path / first.names[1]).write_bytes(b"cut")
    rows = read_manifest(tmp_path / "manifest.jsonl")
    rows[3]["file"] = "../elsewhere.png"
    cut = '{"index": 2, "fi'
    (tmp_path / "manifest.jsonl").write_text("\n".join([*map(json.dumps, rows), "[1]", cut]))
    second = series(tmp_path)
    second.load()
    assert second.missing == [0, 1, 3]
    assert [row["index"] for row in read_manifest(tmp_path / "manifest.jsonl")] == [2]


def test_series_refuses_records_that_do_not_match(tmp_path):
    with pytest.raises(ValueError):
        series(tmp_path).add([0, 1], [picture()], [record(0)])


def test_folder_that_is_a_file_or_lies_below_one(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        OutputFolder(tmp_path / "file")
    with pytest.raises(InputError, match="is a file, so no folder can be made"):
        OutputFolder(tmp_path / "file" / "below")


def test_folder_that_is_not_writable(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *args: False)
    with pytest.raises(InputError, match="is not writable"):
        OutputFolder(tmp_path / "new" / "deep")


def test_looking_changes_nothing(tmp_path):
    OutputFolder(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    OutputFolder(tmp_path / "a" / "b").prepare()
    assert (tmp_path / "a" / "b").is_dir()


def leave_run(folder: Path, *files) -> None:
    """The report and the manifest of a run that made `files`."""
    (folder / "report.json").write_text(to_json({"state": "complete", "settings": {"prompts": "x"}}))
    (folder / "manifest.jsonl").write_text("".join(to_json({"file": file}) + "\n" for file in files))


@pytest.mark.parametrize("report", [None, "{", "[]", '{"settings": {"theme": "dark"}}'])
def test_overwrite_refuses_a_folder_without_a_run(tmp_path, report):
    for name in ("index.html", "images/00001-a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    if report is not None:
        (tmp_path / "report.json").write_text(report)
    with pytest.raises(InputError, match="no run of sage.*give a new or empty folder") as caught:
        OutputFolder(tmp_path, overwrite=True)
    assert str(tmp_path) in str(caught.value)
    assert (tmp_path / "index.html").exists() and (tmp_path / "images/00001-a.png").exists()


def test_overwrite_refuses_to_remove_what_the_run_reads(tmp_path):
    leave_run(tmp_path)
    with pytest.raises(InputError, match="manifest.jsonl: --overwrite would remove this file"):
        OutputFolder(tmp_path, overwrite=True, inputs=["prompts.txt", str(tmp_path / "images" / ".." / "manifest.jsonl")])
    OutputFolder(tmp_path, overwrite=True, inputs=["-", str(tmp_path / "prompts.txt")])


@pytest.mark.parametrize("options", [{"overwrite": True}, {"resume": True}])
def test_things_in_the_way_are_refused(tmp_path, options):
    leave_run(tmp_path)
    (tmp_path / "images").touch()
    with pytest.raises(InputError, match="images: this is a file where a folder"):
        OutputFolder(tmp_path, **options)
    (tmp_path / "images").unlink()
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(InputError, match="plan.json: this is a folder where a file"):
        OutputFolder(tmp_path, **options)
    (tmp_path / "plan.json").rmdir()
    (tmp_path / "report.json").unlink()
    (tmp_path / "report.json").mkdir()
    with pytest.raises(InputError, match="no run of sage|report.json: this is a folder"):
        OutputFolder(tmp_path, **options)


def test_paths_that_cannot_be_made(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "missing")
    for path in (tmp_path / "link", tmp_path / "link" / "below"):
        with pytest.raises(InputError, match="is a link to nothing"):
            OutputFolder(path)
    for path in (tmp_path / ("x" * 300), tmp_path / "new" / ("x" * 300)):
        with pytest.raises(InputError, match="longer than 255 bytes"):
            OutputFolder(path)
    with pytest.raises(InputError, match="cannot be the output folder"):
        OutputFolder(tmp_path.joinpath(*["x" * 200] * 30))


def test_overwrite_takes_away_only_its_own_files(tmp_path):
    own = ["images/00001-a.png", "unshared/00002-b.png", "index.html"]
    others = ["images/holiday.png", "images/00001-a.txt", "notes.txt", "images/sub/00003-c.png", "images/00007-mine.png"]
    for name in own + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    leave_run(tmp_path, "images/00001-a.png", "../images/holiday.png", "notes.txt", None)
    (tmp_path / "unshared.jsonl").write_text(to_json({"file": "unshared/00002-b.png"}))
    OutputFolder(tmp_path, overwrite=True).prepare()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == sorted(others)


def test_overwrite_does_not_follow_a_linked_folder(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "00001-a.png").touch()
    out = tmp_path / "out"
    out.mkdir()
    (out / "images").symlink_to(elsewhere)
    leave_run(out, "images/00001-a.png")
    OutputFolder(out, overwrite=True).prepare()
    assert (elsewhere / "00001-a.png").exists()


def test_resume_compares_settings(tmp_path):
    (tmp_path / "report.json").write_text(to_json({"settings": {"seed": 0, "steps": 20, "prompts": "x"}}))
    folder = OutputFolder(tmp_path, resume=True)
    assert folder.check_resumable({"seed": 0, "steps": 20, "prompts": "x"})
    with pytest.raises(InputError, match="seed was 0 and is 1; solver was null and is \"ddim\""):
        folder.check_resumable({"seed": 1, "steps": 20, "prompts": "x", "solver": "ddim"})
    with pytest.raises(InputError, match="the prompts are others"):
        folder.check_resumable({"seed": 0, "steps": 20, "prompts": "y"})


def test_resume_of_nothing(tmp_path):
    assert OutputFolder(tmp_path / "new", resume=True).check_resumable({}) is False
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="finds no run in this folder"):
        OutputFolder(tmp_path, resume=True).check_resumable({})


def test_missing_manifest_has_no_rows(tmp_path):
    assert read_manifest(tmp_path / "manifest.jsonl") == []
