"""Grouping a prompt file without holding its texts: the groups of `sage.grouping`, whatever the order of the lines."""

import json

import numpy as np
import pytest

from sage.embed import embed_prompts
from sage.group_stream import group_file
from sage.grouping import group

PROMPTS = [f"{adjective} {animal}" for animal in ("cat", "dog", "horse") for adjective in ("red", "blue", "small", "old")]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([*PROMPTS[5:], "", PROMPTS[7], *PROMPTS[:5], "漢字 仮名"]) + "\n", encoding="utf-8")
    return path


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_groups_are_those_of_the_prompts(file, tmp_path):
    out = tmp_path / "groups.jsonl"
    found = group_file(file, out, similarity=0.7, max_size=4, progress=False)
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
        ({"max_size": 0}, "group_file: max_size must be at least 1"),
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
