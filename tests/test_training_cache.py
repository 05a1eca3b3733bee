"""Latents and text embeddings on disk: found by content, made again when damaged, never another encoder's."""

import json
import pickle
import re
import warnings
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sage.training.cache import LatentCache, TensorStore, TextCache
from sage.training.data import Transform, read_training_set

CENTRE = Transform(8, center_crop=True)
BOTH = Transform(8, center_crop=True, random_flip=True)


def folder_of(folder, seeds):
    """A training set of noise pictures."""
    folder.mkdir(exist_ok=True)
    rows = []
    for number, seed in enumerate(seeds):
        pixels = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "text": f"caption {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return read_training_set(folder, progress=False)


@pytest.fixture
def pictures(tmp_path):
    return folder_of(tmp_path / "set", range(5))


class Encoder:
    """A VAE's stand-in, which notes how many pictures it was given; a mirrored picture has other latents."""

    def __init__(self):
        self.batches = []

    def __call__(self, pixels):
        self.batches.append(len(pixels))
        return pixels[:, :1, ::2, ::2] * 2

    @property
    def total(self):
        return sum(self.batches)


def entries(folder):
    return sorted(folder.rglob("*.safetensors"))


def latents_of(pictures, transform, rows, seed=0, epoch=0):
    return torch.stack([Encoder()(transform(pictures.picture(row), seed, epoch, row)[None])[0] for row in rows])


def test_cold_and_warm_are_equal_to_the_bit(pictures, tmp_path):
    encode = Encoder()
    cache = LatentCache(tmp_path / "cache", pictures, CENTRE, "vae")
    assert cache.fill(encode, batch_size=2, progress=False) == 5 and encode.batches == [2, 2, 1]
    assert cache.fill(encode, progress=False) == 0 and encode.total == 5
    warm = LatentCache(tmp_path / "cache", pictures, CENTRE, "vae")
    found = warm.read([3, 0, 3], seed=0, epoch=0)
    assert torch.equal(found, latents_of(pictures, CENTRE, [3, 0, 3])) and found.shape == (3, 1, 4, 4)
    assert len(entries(tmp_path / "cache")) == 5 and not list(tmp_path.rglob("*.part"))


def test_missing_latents_are_made_or_refused(pictures, tmp_path):
    cache, encode = LatentCache(tmp_path / "cache", pictures, CENTRE, "vae"), Encoder()
    assert cache.fill(encode, rows=[1, 3], progress=False) == 2
    with pytest.raises(RuntimeError, match=r"2 of 3 entries are missing or damaged, the first of .*metadata.jsonl, line 3 \(2.png\); fill"):
        cache.read([1, 2, 4, 2], 0, 0)
    found = cache.read([1, 2, 4, 2], 0, 0, encode)
    assert torch.equal(found, latents_of(pictures, CENTRE, [1, 2, 4, 2])) and encode.batches == [2, 2]
    assert torch.equal(cache.read([1, 2, 4, 2], 0, 0), found)


def test_both_sides_are_kept_of_pictures_that_may_be_mirrored(pictures, tmp_path):
    cache, encode = LatentCache(tmp_path / "cache", pictures, BOTH, "vae"), Encoder()
    assert cache.fill(encode, batch_size=4, progress=False) == 10 and encode.batches == [4, 4, 1, 1]
    rows, sides = list(range(5)), set()
    for epoch in range(6):
        assert torch.equal(cache.read(rows, 1, epoch), latents_of(pictures, BOTH, rows, 1, epoch))
        sides |= {BOTH.flipped(1, epoch, 0)}
    assert sides == {False, True} and encode.total == 10
    assert LatentCache(tmp_path / "cache", pictures, CENTRE, "vae").fill(encode, progress=False) == 0  # the plain sides are there


def test_random_crops_are_refused(pictures, tmp_path):
    with pytest.raises(ValueError, match="LatentCache: transform crops at random, .* use center_crop=True, or train without a cache"):
        LatentCache(tmp_path, pictures, Transform(8), "vae")


def test_latents_are_known_by_picture_transform_and_encoder(pictures, tmp_path):
    encode = Encoder()

    def made(training_set=pictures, transform=CENTRE, identity="vae"):
        return LatentCache(tmp_path / "cache", training_set, transform, identity).fill(encode, progress=False)

    assert made() == 5
    assert made(identity="other vae") == 5
    assert made(transform=Transform(4, center_crop=True)) == 5
    assert made(transform=Transform(8, center_crop=True, image_interpolation_mode="box")) == 5
    assert made(folder_of(tmp_path / "copy", [4, 2, 99])) == 1  # two of its pictures have been seen, in another folder and order
    Image.new("RGB", (9, 9)).save(tmp_path / "set" / "0.png")
    assert made() == 1  # a picture that was changed is another picture
    assert made() == 0


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "a flipped bit":
        data[-1] ^= 1
        path.write_bytes(data)
    elif how == "cut short":
        path.write_bytes(data[:-3])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "a pickle":
        path.write_bytes(pickle.dumps({"latents": [1.0]}))
    elif how == "tensors of another program":
        save_file({"latents": torch.zeros(1, 4, 4)}, path)
    elif how == "another entry":
        other = next(entry for entry in entries(path.parents[1]) if entry != path)
        path.write_bytes(other.read_bytes())


@pytest.mark.parametrize("how", ["a flipped bit", "cut short", "empty", "a pickle", "tensors of another program", "another entry"])
def test_damaged_and_foreign_entries_are_made_again_and_said(pictures, tmp_path, how):
    cache, encode = LatentCache(tmp_path / "cache", pictures, CENTRE, "vae"), Encoder()
    cache.fill(encode, progress=False)
    wanted = cache.read([0, 1, 2, 3, 4], 0, 0)
    path = entries(tmp_path / "cache")[2]
    damage(path, how)
    with pytest.warns(UserWarning, match=rf"cache of latents: {re.escape(str(path))} is damaged \(.+\) and is made again"):
        assert torch.equal(cache.read([0, 1, 2, 3, 4], 0, 0, encode), wanted)
    assert encode.batches == [5, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(cache.read([0, 1, 2, 3, 4], 0, 0), wanted)
    damage(path, how)
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(RuntimeError, match="1 of 5 entries are missing or damaged"):
        cache.read([0, 1, 2, 3, 4], 0, 0)
    with pytest.warns(UserWarning, match="is damaged"):
        assert cache.fill(encode, progress=False) == 1


def test_a_write_that_fails_leaves_nothing(pictures, tmp_path, monkeypatch):
    cache = LatentCache(tmp_path / "cache", pictures, CENTRE, "vae")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(RuntimeError, match=r"cache of latents: .* cannot be written \(No space left on device\); make room"):
        cache.fill(Encoder(), progress=False)
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    monkeypatch.undo()
    assert cache.fill(Encoder(), progress=False) == 5


def test_a_folder_that_cannot_be_made(pictures, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RuntimeError, match="cannot be written"):
        LatentCache(tmp_path / "file", pictures, CENTRE, "vae").fill(Encoder(), progress=False)


@pytest.mark.parametrize(
    ("encode", "error", "message"),
    [
        (lambda pixels: pixels[:2], ValueError, r"encode must return latents as \[5, …\], got \[2, 3, 8, 8\]"),
        (lambda pixels: pixels.sum(), ValueError, r"encode must return latents as \[5, …\], got \[\]"),
        (lambda pixels: [pixels], TypeError, "encode must return tensors by name"),
        (lambda pixels: pixels.clone().index_fill_(0, torch.tensor(3), float("nan")), RuntimeError,
         r"encode gave latents that are not finite for .*line 4 \(3.png\); it may need float32"),
    ],
)  # fmt: skip
def test_what_an_encoder_must_not_return(pictures, tmp_path, encode, error, message):
    with pytest.raises(error, match=message):
        LatentCache(tmp_path / "cache", pictures, CENTRE, "vae").fill(encode, progress=False)
    assert not entries(tmp_path / "cache")


def test_kinds_and_shapes_survive(pictures, tmp_path):
    weight = torch.ones(1, requires_grad=True)

    def encode(pixels):
        return (pixels * weight).transpose(1, 3)[:, 2:7].bfloat16()  # strided

    cache = LatentCache(tmp_path / "cache", pictures, CENTRE, "vae")
    cold = cache.read([0, 1], 0, 0, encode)
    assert cold.dtype == torch.bfloat16 and cold.shape == (2, 5, 8, 3) and not cold.requires_grad
    assert torch.equal(cache.read([0, 1], 0, 0), cold)


def test_encoders_with_one_identity_are_found_out(pictures, tmp_path):
    cache = LatentCache(tmp_path / "cache", pictures, CENTRE, "vae")
    cache.fill(Encoder(), rows=[0], progress=False)
    with pytest.raises(RuntimeError, match=r"entries differ, .*\(1, 4, 4\).* but .*\(3, 8, 8\).* had the identity 'vae': use another"):
        cache.read([0, 1], 0, 0, lambda pixels: pixels)


@pytest.mark.parametrize("identity", ["", "  ", None, 3])
def test_an_identity_is_asked_for(identity):
    with pytest.raises(ValueError, match="identity must be a text that tells the encoder from others"):
        TextCache("anywhere", identity)


def encode_text(captions):
    hidden = torch.stack([torch.full((3, 2), float(len(caption))) for caption in captions])
    return {"prompt_embeds": hidden, "mask": torch.tensor([[len(caption) > 2, True] for caption in captions])}


def test_captions(tmp_path):
    calls = []

    def encode(captions):
        calls.append(captions)
        return encode_text(captions)

    cache = TextCache(tmp_path, "encoder")
    assert cache.fill(["a fox", "hen", "a fox", "", "Füchse"], encode, batch_size=3, progress=False) == 4
    assert calls == [["a fox", "hen", ""], ["Füchse"]]
    found = TextCache(tmp_path, "encoder").read(["hen", "", "hen"])
    wanted = encode_text(["hen", "", "hen"])
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert found["mask"].dtype == torch.bool
    with pytest.raises(RuntimeError, match="1 of 2 entries are missing or damaged, the first of the caption 'a fox '; fill"):
        cache.read(["hen", "a fox "])
    with pytest.raises(RuntimeError, match="1 of 1 entries"):
        TextCache(tmp_path, "other encoder").read(["hen"])
    with pytest.raises(TypeError, match="TextCache.read: captions must be a sequence of str"):
        cache.read("hen")
    with pytest.raises(TypeError, match="encode must return tensors by name, got Tensor"):
        cache.read(["new"], lambda captions: torch.zeros(1))


def test_entries_are_plain_safetensors(tmp_path):
    store = TensorStore(tmp_path, "text", "encoder")
    key = store.key("a fox")
    assert re.fullmatch("[0-9a-f]{64}", key) and len({key, store.key("a", "fox"), TensorStore(tmp_path, "latents", "encoder").key("a fox")}) == 3
    store.write(key, {"a": torch.arange(3), "b": torch.tensor(2.5)})
    loaded = load_file(tmp_path / "text" / key[:2] / f"{key}.safetensors")
    assert torch.equal(loaded["a"], torch.arange(3)) and loaded["b"].item() == 2.5
    again = store.read(key)
    assert torch.equal(again["a"], loaded["a"]) and torch.equal(again["b"], loaded["b"]) and store.read(store.key("other")) is None


def test_memory_does_not_grow_with_the_cache(tmp_path):
    """A batch at a time: what was encoded before has been let go of."""
    pictures, made = folder_of(tmp_path / "set", range(12)), []

    def encode(pixels):
        assert all(reference() is None for reference in made)
        latents = pixels * 1
        made.append(weakref.ref(latents))
        return latents

    assert LatentCache(tmp_path / "cache", pictures, CENTRE, "vae").fill(encode, batch_size=3, progress=False) == 12 and len(made) == 4
