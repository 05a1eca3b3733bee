"""Grouping a prompt file without holding its texts: the groups of `sage.grouping`, whatever the order of the lines."""

import hashlib
import json
import tracemalloc

import numpy as np
import pytest

from sage.embed import embed_prompts
from sage.group_stream import group_file
from sage.grouping import group
from sage.prompt_stream import PromptFile

PROMPTS = [f"{adjective} {animal}" for animal in ("cat", "dog", "horse") for adjective in ("red", "blue", "small", "old")]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([*PROMPTS[5:], "", PROMPTS[7], *PROMPTS[:5], "漢字 仮名"]) + "\n", encoding="utf-8")
    return path


def unit_rows(rng, count):
    rows = rng.standard_normal((count, 16)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_groups_are_those_of_the_prompts(file, tmp_path):
    out = tmp_path / "groups.jsonl"
    found = group_file(file, out, similarity=0.7, max_group_size=4, progress=False)
    texts = [line for line in file.read_text(encoding="utf-8").splitlines() if line]
    with pytest.warns(UserWarning, match="mostly unknown"):
        embeddings = embed_prompts(texts)
    known = [i for i, text in enumerate(texts) if i == texts.index(text) and not embeddings.unknown[i]]
    wanted = group(embeddings.vectors[known], [texts[i] for i in known], 0.7, 4)
    shared = sorted(sorted(known[i] for i in members) for members in wanted if len(members) > 1)
    assert shared and [line["members"] for line in lines_of(out)] == shared
    alike = embeddings.vectors @ embeddings.vectors.T
    for line in lines_of(out):
        assert abs(alike[np.ix_(line["members"], line["members"])].min() - line["similarity"]) < 2e-6
    assert sorted(i for members, _ in found.groups for i in members) == known


def test_another_order_of_lines_gives_the_same_groups(file, tmp_path):
    group_file(file, tmp_path / "one.jsonl", similarity=0.7, progress=False)
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in reversed(PROMPTS)), encoding="utf-8")
    group_file(shuffled, tmp_path / "two.jsonl", similarity=0.7, progress=False)
    texts = [line for line in file.read_text(encoding="utf-8").splitlines() if line]
    first = {frozenset(texts[i] for i in line["members"]) for line in lines_of(tmp_path / "one.jsonl")}
    assert first == {frozenset(PROMPTS[::-1][i] for i in line["members"]) for line in lines_of(tmp_path / "two.jsonl")}


def test_a_large_grid_lies_in_a_file(file, tmp_path, monkeypatch):
    group_file(file, tmp_path / "one.jsonl", progress=False)
    monkeypatch.setattr("sage.similarity.IN_MEMORY", 0)
    group_file(file, tmp_path / "two.jsonl", vectors=tmp_path / "one.npy", progress=False)
    assert lines_of(tmp_path / "one.jsonl") == lines_of(tmp_path / "two.jsonl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"similarity": 1.5}, r"group_file: similarity must be in \(-1, 1\]"),
        ({"max_group_size": 0}, "group_file: max_group_size must be at least 1"),
        ({"search": "best"}, "group_file: search must be one of"),
        ({"out": "no/such/folder/groups.jsonl"}, "group_file: out must be in a folder that exists"),
        ({"vectors": "vectors.txt"}, "out must end in .npy"),
        ({"prompts": "missing.txt"}, "missing.txt"),
    ],
)
def test_bad_input_is_refused_before_anything_is_embedded(file, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr("sage.encoders.AutoModel", None, raising=False)
    given = {"prompts": file, "out": tmp_path / "groups.jsonl", "progress": False} | change
    with pytest.raises(ValueError, match=message):
        group_file(given.pop("prompts"), given.pop("out"), **given)
    assert not (tmp_path / "groups.jsonl").exists()


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("prompts.txt", {}, "out must not be the file of the prompts"),
        ("sub/../prompts.txt", {}, "out must not be the file of the prompts"),
        ("link.txt", {}, "out must not be the file of the prompts"),
        ("groups.npy", {}, "out must not be a file of the embeddings"),
        ("groups.npy", {"vectors": "sub/../groups.npy"}, "out must not be a file of the embeddings"),
        ("groups.embedding.json", {"vectors": "groups.npy"}, "out must not be a file of the embeddings"),
        ("groups.jsonl", {"vectors": "prompts.npy", "prompts": "prompts.npy", "resume": False}, "embed_file: out must not name the file"),
    ],
)
def test_no_file_is_two_things(file, tmp_path, monkeypatch, out, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.txt").symlink_to(file)
    (tmp_path / "prompts.npy").write_bytes(file.read_bytes())
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    monkeypatch.setattr("sage.embed_stream.distinct_vectors", None)  # would be called
    with pytest.raises(ValueError, match=message):
        group_file(options.pop("prompts", "prompts.txt"), out, progress=False, **options)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


def test_texts_are_hashed_once_a_run(file, tmp_path, monkeypatch):
    hashed, real = [], hashlib.blake2b
    monkeypatch.setattr("sage.prompt_stream.hashlib.blake2b", lambda *data, **options: hashed.append(data) or real(*data, **options))
    with pytest.warns(UserWarning, match="mostly unknown"):
        group_file(file, tmp_path / "groups.jsonl", progress=False)
    assert len(hashed) == len(PROMPTS) + 2


@pytest.mark.parametrize(("device", "wanted"), [("auto", "cpu"), ("cpu", "cpu"), ("meta", "meta")])
def test_prompts_are_embedded_on_the_cpu_unless_a_device_is_named(file, tmp_path, monkeypatch, device, wanted):
    class Stopped(Exception):
        pass

    def stop(*_, device, **__):
        raise Stopped(device)

    monkeypatch.setattr("sage.group_stream.embed_file", stop)
    with pytest.raises(Stopped, match=wanted):
        group_file(file, tmp_path / "groups.jsonl", device=device)


def test_memory_is_a_fraction_of_the_texts(tmp_path, monkeypatch):
    path, rng = tmp_path / "prompts.txt", np.random.default_rng(0)
    with open(path, "w") as file:
        for number in rng.permutation(4000):
            file.write(f"{number * 7919 % 100_003} " + "a red fox in the snow at night " * 60 + "\n")
    size = path.stat().st_size
    monkeypatch.setattr("sage.embed_stream.distinct_vectors", lambda _, texts, *__, **___: unit_rows(rng, len(texts)))
    monkeypatch.setattr("sage.embed_stream.read_flags", lambda _, texts: np.zeros((2, len(texts)), dtype=bool))
    monkeypatch.setattr(PromptFile.canonical_order, "__defaults__", (200_000,))  # as for a file of more than 32 MB
    group_file(path, tmp_path / "warm.jsonl", chunk=64, progress=False)  # what is loaded once is no part of it
    tracemalloc.start()
    try:
        found = group_file(path, tmp_path / "groups.jsonl", chunk=64, progress=False)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(len(members) for members, _ in found.groups) == 4000
    assert size > 7e6 and peak < size / 3, f"{peak / 1e6:.1f} MB for {size / 1e6:.1f} MB of texts"
