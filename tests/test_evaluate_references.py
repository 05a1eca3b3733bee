"""What drawn pictures are compared with: a folder, a picture for each prompt, real scenes."""

import json

import evaluation_parts as parts
import numpy as np
import pytest
import torch
from PIL import Image

from sage.evaluation.asked import Source, ask, read_source
from sage.evaluation.command import Evaluation
from sage.evaluation.folder import EvaluationFolder
from sage.evaluation.judge import QUICK_RESAMPLES, Judge
from sage.evaluation.references import Files, check_images, find_references, picture_of
from sage.evaluation.request import Request
from sage.prompts import InputError, PromptSet

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    parts.patch(monkeypatch)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    parts.real_pictures(folder, len(parts.PROMPTS))
    return folder


def source_of(folder, names, prompts=parts.PROMPTS) -> Source:
    file = folder.parent / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt, "image": name}) + "\n" for prompt, name in zip(prompts, names)))
    return read_source(str(file), True)


def asked_of(source, images=2):
    return ask(source, images=images, seed=0, similarity=0.6, max_group_size=8, limit=None, everyone=False)


def judge_of(asked, references, out) -> Judge:
    folder = EvaluationFolder(out, resume=True)
    folder.prepare()
    return Judge(asked, [("clip:tiny", parts.Judging())], references, folder, QUICK_RESAMPLES)


def test_a_folder_alone_is_a_set_without_an_order(photos, tmp_path):
    (photos / "below").mkdir()
    (photos / "0.png").rename(photos / "below" / "0.JPG")
    source = Source(PromptSet("test", tuple(parts.PROMPTS)))
    references = find_references(str(photos), source, asked_of(source))
    assert references.count == len(parts.PROMPTS) and references.images == 0
    judge = judge_of(asked_of(source), references, tmp_path / "out")
    assert judge.real("clip:tiny") is None and judge.floor("clip:tiny")["frechet"]["n"] == 4


def test_pictures_of_prompts_follow_the_prompts(photos):
    names = [f"{number}.png" for number in reversed(range(8))]
    source = source_of(photos, names)
    asked = asked_of(source)
    references = find_references(str(photos), source, asked)
    wanted = [np.array(Image.open(photos / names[parts.PROMPTS.index(prompt)])) for prompt in asked.prompts]
    assert np.array_equal(np.stack(list(references.pictures())), np.stack(wanted)) and references.places == list(range(7))


def test_a_photograph_of_several_prompts_counts_once(photos, tmp_path):
    """As in COCO. Its group has no row of real pictures, where two captions would both be right."""
    (photos / "1.png").write_bytes((photos / "0.png").read_bytes())  # of "a red cat" and "a red car"
    source = source_of(photos, [f"{number}.png" for number in range(8)])
    asked = asked_of(source)
    references = find_references(str(photos), source, asked)
    assert references.count == 6 and references.places == [0, 0, 1, 2, 3, 4, 5]
    judge = judge_of(asked, references, tmp_path / "out")
    assert judge.real_groups() == [1, 2] and judge.floor("clip:tiny")["frechet"]["n"] == 3
    real = judge.real("clip:tiny")
    assert real["identification"].estimate().n == 4 and real["score"].estimate().groups == 2
    (photos / "4.png").write_bytes((photos / "3.png").read_bytes())
    judge = judge_of(asked, find_references(str(photos), source, asked), tmp_path / "out")
    assert judge.real_groups() == [2] and judge.real("clip:tiny") is None


def test_equal_pictures_are_no_set(photos):
    for number in range(1, 8):
        (photos / f"{number}.png").write_bytes((photos / "0.png").read_bytes())
    source = Source(PromptSet("test", tuple(parts.PROMPTS)))
    with pytest.raises(InputError, match="at least two different pictures, got 8 files with 1"):
        find_references(str(photos), source, asked_of(source))


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "below/../../secret.png", "", ".", "missing.png", "link.png", "a\0b"])
def test_names_that_lead_out_of_the_folder_are_refused(photos, name):
    (photos.parent / "secret.png").write_bytes((photos / "0.png").read_bytes())
    (photos / "link.png").symlink_to(photos.parent / "secret.png")
    with pytest.raises(InputError, match='"image"'):
        picture_of(photos, name)


def test_they_are_refused_before_a_model_is_loaded(photos, tmp_path):
    source_of(photos, ["../x.png"] * 8)
    for images, said in ((str(photos), "must be the name of a file inside --images"), (None, "give --images FOLDER")):
        with pytest.raises(InputError, match=said):
            Evaluation(Request(out=str(tmp_path / "out"), images=images), str(tmp_path / "prompts.jsonl"), print)
    assert not (tmp_path / "out").exists()


def test_an_image_on_some_lines_only_is_refused(photos, tmp_path):
    (tmp_path / "some.jsonl").write_text('{"prompt": "a", "image": "0.png"}\n{"prompt": "b"}\n')
    with pytest.raises(InputError, match='1 of 2 lines name an "image"'):
        read_source(str(tmp_path / "some.jsonl"), True)
    check_images(None, Source(PromptSet("test", ("a",))))


def broken_png(data: bytes) -> bytes:
    return data[:30] + b"\xff" * 20 + data[50:]  # another length of a chunk: Pillow raises a SyntaxError


@pytest.mark.parametrize("damage", [lambda data: b"no", lambda data: data[: len(data) // 2], broken_png])
def test_a_file_that_is_no_picture_is_named(damage, photos):
    (photos / "0.png").write_bytes(damage((photos / "0.png").read_bytes()))
    with pytest.raises(InputError, match="0.png cannot be read as a picture"):
        list(Files("x", (photos / "0.png", photos / "1.png"), aligned=False).pictures())


def test_an_enormous_picture_is_named(photos, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match="0.png cannot be read as a picture .*decompression bomb"):
        list(Files("x", (photos / "0.png", photos / "1.png"), aligned=False).pictures())


def test_features_of_other_weights_are_made_anew(photos, tmp_path):
    source = Source(PromptSet("test", tuple(parts.PROMPTS)))
    judge = judge_of(asked_of(source), find_references(str(photos), source, asked_of(source)), tmp_path / "out")
    extractor, seen = judge.extractors[0][1], []
    run = extractor.image_features
    extractor.image_features = lambda images: seen.append(1) or run(images)
    judge.look_at_references()
    judge.look_at_references()
    assert len(seen) == 1
    extractor.identity = "seed 1"
    judge.look_at_references()
    assert len(seen) == 2


def test_changed_pictures_are_looked_at_anew(photos, tmp_path):
    source = Source(PromptSet("test", tuple(parts.PROMPTS)))
    references = find_references(str(photos), source, asked_of(source))
    first = judge_of(asked_of(source), references, tmp_path / "out")._reference("clip:tiny")
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(photos / "3.png")
    references = find_references(str(photos), source, asked_of(source))
    second = judge_of(asked_of(source), references, tmp_path / "out")._reference("clip:tiny")
    assert [bool(row) for row in (first != second).any(1)] == [number == 3 for number in range(8)]


class Scene:
    def __init__(self, caption):
        self.caption = caption


def test_the_benchmark_has_two_draws_of_real_pictures(monkeypatch, tmp_path):
    """One is the reference, the other the row of real pictures, whose distance is the floor."""
    seeds = []

    def draw(scenes, images_per_prompt=1, seed=0):
        seeds.append(seed)
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, 256, (len(scenes) * images_per_prompt, 3, 16, 16), generator=generator, dtype=torch.uint8)

    monkeypatch.setattr("sage.emoji.benchmark", lambda held_out=False: [Scene(prompt) for prompt in parts.PROMPTS], raising=False)
    monkeypatch.setattr("sage.emoji.real_pictures", draw, raising=False)
    source = read_source(None, False)
    asked = asked_of(source)
    references = find_references(None, source, asked)
    judge = judge_of(asked, references, tmp_path / "out")
    real, floor = judge.real("clip:tiny"), judge.floor("clip:tiny")
    assert set(real) == {"identification", "score", "diversity", "vendi", "frechet", "kernel"} and len(set(seeds)) == 2
    assert floor["frechet"]["value"] == real["frechet"].estimate().value > 0
    assert floor["frechet"]["n"] == asked.pictures and floor["frechet"]["comparable"]
    assert find_references(None, source, asked).identity == references.identity
    monkeypatch.setattr("sage.emoji.real_pictures", lambda *args: draw(*args) // 2)  # other sprites
    assert find_references(None, source, asked).identity != references.identity


def test_without_references_there_are_no_distances(tmp_path):
    source = Source(PromptSet("test", tuple(parts.PROMPTS)))
    judge = judge_of(asked_of(source), find_references(None, source, asked_of(source)), tmp_path / "out")
    assert judge.floor("clip:tiny") is None and judge.real("clip:tiny") is None
