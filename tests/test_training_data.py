"""Training data: what is read, every way in which it may be wrong, and how pictures become tensors."""

import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

from sage.prompts import InputError
from sage.training.data import INTERPOLATION, PROBLEMS_SHOWN, Transform, draw, read_training_set


def picture(width=8, height=6, colour=(200, 30, 60)):
    return Image.new("RGB", (width, height), colour)


def folder_of(tmp_path, rows, name="metadata.jsonl"):
    """A folder with metadata; rows are objects or raw lines, and every plain file name in them becomes a small picture."""
    for row in rows:
        file = row.get("file_name") if isinstance(row, dict) else None
        if isinstance(file, str) and re.fullmatch(r"[a-z]\d*\.png", file):
            picture().save(tmp_path / file)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def refusal(source, **options):
    with pytest.raises(InputError) as caught:
        read_training_set(source, **options)
    return str(caught.value)


def test_reads_jsonl(tmp_path):
    rows = [{"file_name": "a.png", "text": " a red fox "}, "", {"file_name": "b.png", "text": "ein Fuchs\u2028im Schnee", "other": 1}]
    found = read_training_set(folder_of(tmp_path, rows))
    assert len(found) == 2 and found.captions == ("a red fox", "ein Fuchs\u2028im Schnee")
    assert found.where(1) == f"{tmp_path / 'metadata.jsonl'}, line 3 (b.png)"
    assert found.picture(0).size == (8, 6) and found.picture(0).getpixel((3, 3)) == (200, 30, 60)


def test_reads_csv_with_rows_over_several_lines(tmp_path):
    folder = folder_of(tmp_path, ["file_name,text,x", 'a.png,"a fox,\nrunning",1', "", "b.png,a hen,2"], "metadata.csv")
    for name in ("a.png", "b.png"):
        picture().save(folder / name)
    found = read_training_set(str(folder))
    assert found.captions == ("a fox,\nrunning", "a hen") and found.where(1).endswith("line 5 (b.png)")


def test_split_subfolder_and_other_columns(tmp_path):
    (tmp_path / "train" / "sub").mkdir(parents=True)
    picture(5, 5).save(tmp_path / "train" / "sub" / "a.png")
    row = {"photo_file_name": "sub/a.png", "caption": "a fox"}
    (tmp_path / "train" / "metadata.jsonl").write_text(json.dumps(row))
    found = read_training_set(tmp_path, image_column="photo", caption_column="caption")
    assert found.captions == ("a fox",) and found.picture(0).size == (5, 5) and "(sub/a.png)" in found.where(0)


def test_limit_reads_and_checks_the_first(tmp_path):
    rows = [{"file_name": "a.png", "text": "a"}, {"file_name": "b.png", "text": "b"}, {"file_name": "gone.jpg", "text": "c"}]
    folder = folder_of(tmp_path, rows)
    assert read_training_set(folder, limit=2).captions == ("a", "b")
    assert "gone.jpg" in refusal(folder, limit=3)
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        read_training_set(folder, limit=0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"file_name": "gone.jpg", "text": "a"}, "no such file: 'gone.jpg'"),
        ({"file_name": "../a.png", "text": "a"}, "'../a.png' leaves the folder; name a file in "),
        ({"file_name": "x/../../a.png", "text": "a"}, "'x/../../a.png' leaves the folder"),
        ({"file_name": "/etc/passwd", "text": "a"}, "'/etc/passwd' leaves the folder"),
        ({"file_name": "C:\\a.png", "text": "a"}, "leaves the folder"),
        ({"file_name": "..\\a.png", "text": "a"}, "leaves the folder"),
        ({"file_name": "linked.png", "text": "a"}, "'linked.png' leaves the folder by a symbolic link"),
        ({"file_name": "circle", "text": "a"}, "circle"),
        ({"file_name": "sub", "text": "a"}, "'sub' is a folder, not a picture"),
        pytest.param({"file_name": "a\0.png", "text": "a"}, "is no usable file name", id="zero"),
        ({"file_name": 3, "text": "a"}, "'file_name' must be the name of a file, got 3"),
        ({"file_name": "", "text": "a"}, "'file_name' must be the name of a file, got ''"),
        ({"file_name": "note.txt", "text": "a"}, "note.txt: not a picture that Pillow can read"),
        ({"file_name": "short.jpg", "text": "a"}, "short.jpg: the picture cannot be read (image file is truncated"),
        ({"file_name": "flipped.png", "text": "a"}, "flipped.png: the picture cannot be read"),
        ({"file_name": "float.tiff", "text": "a"}, "mode F has no range of its own"),
        ({"file_name": "a.png", "text": "  "}, "the caption is empty ('text')"),
        ({"file_name": "a.png", "text": ["x", "y"]}, "'text' must be a string, got ['x', 'y']"),
        ({"file_name": "a.png", "text": None}, "'text' must be a string, got None"),
        ({"file_name": "a.png", "text": "\ud800"}, "half of a surrogate pair"),
        ({"file_name": "a.png"}, "no 'text', only 'file_name'"),
        ({"text": "a"}, "no 'file_name', only 'text'"),
        ('{"file_name": "a.png", "text" "a"}', "malformed JSON (Expecting ':' delimiter at character 31)"),
        ('["a.png", "a"]', 'wanted an object like {"file_name": "cat.png", "text": "a cat"}, got list'),
        pytest.param("[" * 100_000, "malformed JSON", id="deep"),
    ],
)
def test_every_problem_names_file_and_line(tmp_path, row, message):
    folder = tmp_path / "set"
    folder.mkdir()
    folder_of(folder, [{"file_name": "a.png", "text": "a fox"}, "", row])
    (folder / "sub").mkdir()
    (folder / "note.txt").write_text("no picture")
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "short.jpg")
    (folder / "short.jpg").write_bytes((folder / "short.jpg").read_bytes()[:900])
    Image.fromarray(noise).save(folder / "flipped.png")
    data = bytearray((folder / "flipped.png").read_bytes())
    data[200] ^= 255
    (folder / "flipped.png").write_bytes(data)
    Image.fromarray(np.zeros((4, 4), np.float32)).save(folder / "float.tiff")
    picture().save(tmp_path / "outside.png")
    os.symlink(tmp_path / "outside.png", folder / "linked.png")
    os.symlink(folder / "circle", folder / "circle")
    said = refusal(folder)
    path = folder / "metadata.jsonl"
    assert said.startswith(f"{path}: 1 problem, nothing was trained:\n  {path}, line 3: ") and message in said
    assert said.count("\n") == 1


def test_a_link_inside_the_folder_is_followed(tmp_path):
    folder = folder_of(tmp_path, [{"file_name": "link", "text": "a"}])
    picture(3, 3).save(folder / "real.png")
    os.symlink("real.png", folder / "link")
    assert read_training_set(folder).picture(0).size == (3, 3)


def test_ten_problems_are_shown_and_all_are_counted(tmp_path):
    rows = [{"file_name": f"p{i}.png", "text": "" if i % 2 else "a"} for i in range(30)]
    folder = folder_of(tmp_path, rows)
    (folder / "p4.png").unlink()
    said = refusal(folder)
    assert "16 problems, nothing was trained; the first 10:" in said and said.count("\n") == PROBLEMS_SHOWN
    assert [int(n) for n in re.findall(r", line (\d+): ", said)] == [2, 4, 5, 6, 8, 10, 12, 14, 16, 18]
    (folder / "metadata.jsonl").write_text('{"file_name": "gone.jpg", "text": ""}\n')
    assert refusal(folder).count(", line 1: ") == 2  # a line may be wrong twice


def test_a_column_that_is_nowhere_is_said_once(tmp_path):
    folder = folder_of(tmp_path, [{"file_name": "a.png", "caption": "x"}, {"file_name": "b.png", "label": 1}])
    assert "no column 'text'; there are 'caption', 'file_name', 'label'. Name the right ones with" in refusal(folder)
    assert "no column 'photo_file_name'" in refusal(folder, image_column="photo", caption_column="caption")


def test_malformed_csv(tmp_path):
    folder = folder_of(tmp_path, ["file_name,text", "a.png,a fox, running", 'b.png,"open'], "metadata.csv")
    said = refusal(folder)
    assert "line 2: malformed CSV (3 fields under 2 columns; quote commas)" in said and "line 3: malformed CSV (unexpected end" in said


def test_metadata_that_cannot_be_read(tmp_path):
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "a.png"}\n\xff\n')
    assert "metadata.jsonl, line 2: not UTF-8" in refusal(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("\n\n")
    assert "metadata.jsonl: no pictures in it" in refusal(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    assert "both metadata.jsonl and metadata.csv" in refusal(tmp_path)
    assert "this is a file; give the folder" in refusal(tmp_path / "metadata.csv")
    (tmp_path / "metadata.jsonl").unlink()
    assert "metadata.csv: no pictures in it" in refusal(tmp_path)


def test_folders_without_metadata(tmp_path):
    assert "no images in it; wanted image files and a metadata.jsonl" in refusal(tmp_path)
    picture().save(tmp_path / "a.png")
    assert "1 image, but no metadata.jsonl or metadata.csv" in refusal(tmp_path)
    assert "no such folder" in refusal(tmp_path / "elsewhere")
    folder_of(tmp_path, [{"file_name": "a.png", "text": "a"}])
    assert "no folder 'test' in it" in refusal(tmp_path, split="test")


def test_one_picture_is_enough(tmp_path):
    assert len(read_training_set(folder_of(tmp_path, [{"file_name": "a.png", "text": "a"}]))) == 1


def decoded(tmp_path, image, name="x.png", **options):
    image.save(tmp_path / name, **options)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
    return read_training_set(tmp_path).picture(0)


def test_pictures_are_turned_as_exif_says(tmp_path):
    image = Image.new("RGB", (4, 2), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: the top left corner goes to the top right
    turned = decoded(tmp_path, image, exif=exif)
    assert turned.size == (2, 4) and turned.getpixel((1, 0)) == (255, 255, 255) and turned.getpixel((0, 0)) == (0, 0, 0)


def test_transparency_is_laid_on_white(tmp_path):
    image = Image.new("RGBA", (3, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (10, 20, 30, 0))
    image.putpixel((2, 0), (0, 0, 0, 51))  # a fifth of black: 255 · 0.8
    flat = decoded(tmp_path, image)
    assert flat.mode == "RGB" and [flat.getpixel((x, 0)) for x in range(3)] == [(10, 20, 30), (255,) * 3, (204,) * 3]
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([9, 9, 9, 70, 80, 90])
    palette.putpixel((1, 0), 1)
    flat = decoded(tmp_path, palette, transparency=0)
    assert [flat.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (70, 80, 90)]
    grey = decoded(tmp_path, Image.new("LA", (1, 1), (7, 0)))
    assert grey.getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    image = Image.fromarray(np.array([[0, 257, 32896, 65535]], np.uint16))
    assert [value[0] for value in np.asarray(decoded(tmp_path, image))[0]] == [0, 1, 128, 255]


def encoded_table(images, captions):
    datasets = pytest.importorskip("datasets", reason="the optional library datasets is not installed")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    return datasets.Dataset.from_dict({"image": images, "text": captions}, features=features)


def test_reads_data_sets_of_the_library(tmp_path, monkeypatch):
    table = encoded_table([picture(5, 5), picture(7, 4, (1, 2, 3))], ["a", " b "])
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(tmp_path / "both")
    (tmp_path / "parquet").mkdir()
    table.to_parquet(tmp_path / "parquet" / "train-0.parquet")
    for source in (table, tmp_path / "saved", tmp_path / "both", str(tmp_path / "parquet")):
        found = read_training_set(source)
        assert found.captions == ("a", "b") and found.picture(1).size == (7, 4) and found.picture(1).getpixel((0, 0)) == (1, 2, 3)
        assert found.where(1).endswith(", row 1")
    assert read_training_set(tmp_path / "both", split="test").captions == ("b",)
    assert read_training_set(table, limit=1).captions == ("a",)
    assert "no split 'dev'; there are 'train', 'test'" in refusal(tmp_path / "both", split="dev")
    assert "datasets cannot read it" in refusal(tmp_path / "parquet", split="dev")
    assert "no column 'caption'; there are 'image', 'text'" in refusal(table, caption_column="caption")
    assert "not images; use dataset.cast_column('text', datasets.Image())" in refusal(table, image_column="text", caption_column="image")
    assert "no pictures in it" in refusal(table.select([]))
    with pytest.raises(TypeError, match="source must be a folder, a name, a datasets.Dataset or a DatasetDict, got dict"):
        read_training_set({"image": []})


def test_rows_of_a_data_set_are_checked(tmp_path):
    broken = {"bytes": b"no picture", "path": None}
    gone = {"bytes": None, "path": str(tmp_path / "gone.png")}
    said = refusal(encoded_table([picture(), None, broken, gone, picture()], ["a", "b", "c", "d", ""]))
    assert said.startswith("the data set: 4 problems")
    for row, what in ((1, "the picture cannot be read (the row holds none)"), (2, "not a picture that Pillow can read"),
                      (3, "the picture cannot be read ([Errno 2]"), (4, "the caption is empty")):  # fmt: skip
        assert f"row {row}: {what}" in said


def test_without_the_library_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"owner/name' needs the library datasets: pip install \"sage-diffusion\[train\]\""):
        read_training_set("owner/name")
    folder = folder_of(tmp_path, [{"file_name": "a.png", "text": "a"}])
    assert len(read_training_set(folder)) == 1  # a folder of pictures does without


def gradient(width, height):
    """A picture whose red is its column and whose green is its row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width)[None], np.arange(height)[:, None]
    return Image.fromarray(pixels)


def columns_and_rows(pixels):
    """The columns and rows of a `gradient` that a transform has kept."""
    red, green, _ = ((pixels * 0.5 + 0.5) * 255).round().int()
    return red[0].tolist(), green[:, 0].tolist()


def test_centre_crop_by_hand():
    pixels = Transform(4, center_crop=True)(gradient(9, 4), seed=0, epoch=0, index=0)
    assert pixels.shape == (3, 4, 4) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    assert columns_and_rows(pixels) == ([2, 3, 4, 5], [0, 1, 2, 3])  # (9 − 4) / 2 rounds to the even 2, as torchvision has it
    assert pixels[0, 0].tolist() == pytest.approx([value / 127.5 - 1 for value in (2, 3, 4, 5)], abs=1e-6)
    mirrored = Transform(4, center_crop=True, random_flip=True).centred(gradient(9, 4), flip=True)
    assert torch.equal(mirrored, pixels.flip(2)) and not torch.equal(mirrored, pixels)


def test_the_ends_of_the_range_are_exact():
    for colour, value in (("black", -1.0), ("white", 1.0)):
        assert (Transform(2, center_crop=True)(Image.new("RGB", (5, 3), colour), 0, 0, 0) == value).all()


def test_the_shorter_side_becomes_the_resolution():
    transform = Transform(6, image_interpolation_mode="nearest")
    assert transform._resized(gradient(5, 12)).size == (6, 14) and transform._resized(gradient(12, 5)).size == (14, 6)
    assert transform._resized(gradient(3, 7)).size == (6, 14) and transform._resized(gradient(7, 7)).size == (6, 6)


def test_interpolation_modes_by_hand():
    image = Image.fromarray(np.array([[0, 40, 0, 0], [0, 0, 0, 200], [8, 0, 0, 0], [0, 0, 100, 100]], np.uint8)).convert("RGB")
    shrunk = {mode: Transform(2, True, image_interpolation_mode=mode)(image, 0, 0, 0) for mode in INTERPOLATION}
    values = {mode: ((pixels[0] * 0.5 + 0.5) * 255).round().int().tolist() for mode, pixels in shrunk.items()}
    assert values["box"] == [[10, 50], [2, 50]]  # means of 2 × 2
    assert values["nearest"] == values["nearest_exact"] != values["box"] and values["lanczos"] != values["bilinear"] != values["box"]


def test_random_crops_and_flips_depend_on_seed_epoch_and_index_alone():
    transform, image = Transform(4, random_flip=True), gradient(7, 4)
    seen = {}
    for key in [(seed, epoch, index) for seed in range(4) for epoch in range(10) for index in range(10)]:
        seen[key] = columns_and_rows(transform(image, *key))[0]
        assert seen[key] == columns_and_rows(transform(image, *key))[0]
    places = [min(columns) for columns in seen.values()]
    assert [70 < places.count(left) < 130 for left in range(4)] == [True] * 4  # 100 each, ±3.5 standard deviations
    assert 165 < sum(columns[0] > columns[1] for columns in seen.values()) < 235
    for varied in range(3):  # each of the three matters
        keys = [tuple(value if place == varied else 0 for place in range(3)) for value in range(4)]
        assert len({tuple(seen[key]) for key in keys}) > 1


def test_draws_are_the_same_everywhere():
    assert draw("deal", 0, 1, 2) == draw("deal", 0, 1, 2) != draw("deal", 0, 12)
    assert draw("flip", 7, 0, 3) == 15586681266447817069  # blake2b of b"flip 7 0 3", 8 bytes, little endian


def test_transform_refusals():
    with pytest.raises(ValueError, match="image_interpolation_mode must be one of bicubic, .*, got 'cubic'"):
        Transform(4, image_interpolation_mode="cubic")
    with pytest.raises(ValueError, match="resolution must be at least 1, got 0"):
        Transform(0)
    with pytest.raises(TypeError, match="resolution must be an integer"):
        Transform(4.5)
