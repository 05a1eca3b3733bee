"""Embedding a prompt file into a .npy file: bounded memory, and the same bits with and without an interruption."""

import json
import tracemalloc
import warnings

import numpy as np
import pytest
from test_embed import WORDS, build_bert, save

from sage import embed_stream
from sage.embed import Embeddings, embed_prompts
from sage.embed_files import load_embeddings
from sage.embed_stream import embed_file
from sage.prompt_stream import PromptFile
from sage.prompts import InputError


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("encoder"), build_bert())


@pytest.fixture
def source(tmp_path):
    """150 prompts, many of them repeated."""
    rng = np.random.default_rng(0)
    distinct = [" ".join(rng.choice(WORDS, rng.integers(1, 30))) for _ in range(70)]
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(distinct[number] for number in rng.integers(0, 70, 150)) + "\n")
    return path


def run(source, out, encoder, **options) -> Embeddings:
    return embed_file(source, out, encoder, **{"chunk": 16, "batch_size": 8, "progress": False} | options)


def names(folder) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if not file.name.startswith("prompts"))


COMPLETE = ["v.embedding.json", "v.npy", "v.unknown.npy"]


def test_the_vectors_are_those_of_embed_prompts(source, encoder, tmp_path):
    found = run(source, tmp_path / "v.npy", encoder, progress=True)
    assert isinstance(found.vectors, np.memmap) and not found.vectors.flags.writeable and found.encoder == encoder
    assert found.vectors.dtype == np.float32 and found.vectors.shape == (150, 32) and found.unknown.dtype == bool
    texts = list(PromptFile(source))
    assert np.abs(found.vectors - embed_prompts(texts, encoder).vectors).max() < 2e-6
    one_chunk = run(source, tmp_path / "w.npy", encoder, chunk=150)
    assert (one_chunk.vectors == embed_prompts(texts, encoder, batch_size=8).vectors).all()
    assert names(tmp_path)[:3] == COMPLETE
    assert (load_embeddings(tmp_path / "v.npy", texts).vectors == found.vectors).all()


def test_equal_prompts_have_equal_rows_and_are_embedded_once(source, encoder, tmp_path, monkeypatch):
    seen = []
    real = embed_stream.distinct_vectors
    monkeypatch.setattr(embed_stream, "distinct_vectors", lambda encoder, texts, *rest, **more: seen.extend(texts) or
                        real(encoder, texts, *rest, **more))
    found = run(source, tmp_path / "v.npy", encoder)
    first = PromptFile(source).first_positions()
    assert (first != np.arange(150)).sum() > 50 and (found.vectors == found.vectors[first]).all()
    assert sorted(seen) == sorted(set(PromptFile(source)))


def test_jsonl_and_an_open_file(source, encoder, tmp_path):
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": text}) for text in PromptFile(source)))
    with PromptFile(rows) as opened:
        found = run(opened, tmp_path / "v.npy", encoder)
        assert opened[0]  # stays open
    assert (found.vectors == run(source, tmp_path / "w.npy", encoder).vectors).all()


def stop_after(monkeypatch, chunks: int, method: str = "note"):
    """Interrupt in place of the call after `chunks` calls of a method of the files."""
    real, calls = getattr(embed_stream._Files, method), []

    def interrupted(self, *args, **options):
        if len(calls) == chunks:
            raise KeyboardInterrupt
        calls.append(None)
        return real(self, *args, **options)

    monkeypatch.setattr(embed_stream._Files, method, interrupted)


@pytest.mark.parametrize("chunks", [0, 1, 4, 9, 10])
def test_an_interrupted_run_goes_on_to_the_same_bits(source, encoder, tmp_path, monkeypatch, chunks):
    whole = run(source, tmp_path / "w.npy", encoder)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, chunks)
        run(source, tmp_path / "v.npy", encoder)
    if chunks < 10:
        assert not (tmp_path / "v.npy").exists()
    seen = []
    real = embed_stream.read_flags
    monkeypatch.setattr(embed_stream, "read_flags", lambda encoder, texts: seen.append(texts) or real(encoder, texts))
    found = run(source, tmp_path / "v.npy", encoder)
    assert len(seen) <= 10 - chunks
    assert found.vectors.tobytes() == whole.vectors.tobytes() and (found.unknown == whole.unknown).all()
    assert names(tmp_path)[:3] == COMPLETE


def test_an_interruption_between_the_two_renamings(source, encoder, tmp_path, monkeypatch):
    real, moved = embed_stream.os.replace, []

    def replace(old, new):
        if str(new).endswith("v.npy"):
            raise KeyboardInterrupt
        moved.append(new)
        real(old, new)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(embed_stream.os, "replace", replace)
        run(source, tmp_path / "v.npy", encoder)
    assert names(tmp_path) == ["v.embedding.json", "v.npy.part", "v.unknown.npy"]
    assert run(source, tmp_path / "v.npy", encoder).vectors.any(axis=1).all() and names(tmp_path) == COMPLETE


def test_a_complete_run_is_returned_as_it_is(source, encoder, tmp_path, monkeypatch):
    first = run(source, tmp_path / "v.npy", encoder)
    monkeypatch.setattr("sage.encoders._load", lambda *args: pytest.fail("the encoder was loaded"))
    again = run(source, tmp_path / "v.npy", encoder)
    assert again.vectors.tobytes() == first.vectors.tobytes() and again.encoder == first.encoder


def test_warnings_are_those_of_the_whole_file_and_survive_an_interruption(encoder, tmp_path, monkeypatch):
    source = tmp_path / "prompts.txt"
    source.write_text("\n".join(["ein Fuchs", " ".join(["fox"] * 50), "a fox", "ein Fuchs", " ".join(["fox"] * 60), "a boat"]))
    said = []
    for name, chunks in (("v.npy", None), ("w.npy", 1), ("w.npy", None)):
        with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if chunks:
                stop_after(patch, chunks)
                with pytest.raises(KeyboardInterrupt):
                    run(source, tmp_path / name, encoder, chunk=2)
            else:
                assert run(source, tmp_path / name, encoder, chunk=2).unknown.tolist() == [1, 0, 0, 1, 0, 0]
        said.append([str(warning.message) for warning in caught])
    assert said[0] == said[2] and not said[1] and len(said[0]) == 2
    assert "2 distinct prompts are longer" in said[0][0] and "2 of 6 prompts are mostly unknown" in said[0][1]


def test_a_run_of_something_else_is_refused(source, encoder, tmp_path, monkeypatch):
    out = tmp_path / "v.npy"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 2)
        run(source, out, encoder)
    other = save(tmp_path / "prompts-other", build_bert(positions=30))
    for options, message in (({"encoder": other}, "was begun with encoder"), ({"chunk": 17}, "chunk 16 instead of 17"),
                             ({"batch_size": 9}, "batch_size 8 instead of 9")):
        with pytest.raises(ValueError, match=f"{message}.*; give another out, or start anew with resume=False"):
            run(source, out, **{"encoder": encoder} | options)
    source.write_text(source.read_text() + "a fox\n")
    with pytest.raises(ValueError, match="was begun with prompts .*rows 150 instead of 151"):
        run(source, out, encoder)
    assert len(run(source, out, encoder, resume=False)) == 151 and names(tmp_path) == COMPLETE


def test_files_that_are_lost_or_damaged_are_named(source, encoder, tmp_path):
    out = tmp_path / "v.npy"
    np.save(out, np.ones(3))
    with pytest.raises(ValueError, match="v.npy is there, but no v.embedding.json that says what it was made from"):
        run(source, out, encoder)
    run(source, out, encoder, resume=False)
    np.save(out, np.ones(3))
    with pytest.raises(ValueError, match=r"v.npy must hold float32 of 150 prompts, got float64 \[3\]"):
        run(source, out, encoder)
    out.write_bytes(out.read_bytes()[:-1])
    with pytest.raises(ValueError, match="v.npy cannot be read .*start anew"):
        run(source, out, encoder)
    out.unlink()
    with pytest.raises(ValueError, match="says that 150 rows are done, but v.npy is gone"):
        run(source, out, encoder)
    for text in ("{", "[]", '{"made_from": {}}', '{"made_from": 3, "done": 1, "cut": 0, "complete": false}'):
        (tmp_path / "v.embedding.json").write_text(text)
        with pytest.raises(ValueError, match="v.embedding.json is no record of a run"):
            run(source, out, encoder)


def test_bad_arguments(source, encoder, tmp_path):
    for options, message in (({"out": "v.parquet"}, "out must end in .npy"), ({"chunk": 0}, "chunk must be at least 1"),
                             ({"batch_size": 0}, "batch_size must be at least 1"), ({"encoder": "./none"}, "does not exist")):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run(source, **{"out": tmp_path / "v.npy", "encoder": encoder} | options)
    with pytest.raises(InputError, match="no such file"):
        run(tmp_path / "none.txt", tmp_path / "v.npy", encoder)
    with pytest.raises(OSError):
        run(source, tmp_path / "none" / "v.npy", encoder)


def test_memory_is_a_fraction_of_the_file(encoder, tmp_path, monkeypatch):
    """All but the encoder, whose memory goes with the chunk and is not Python's."""
    monkeypatch.setattr(embed_stream, "distinct_vectors", lambda encoder, texts, *rest, **more: np.ones((len(texts), 32), np.float32))
    monkeypatch.setattr(embed_stream, "read_flags", lambda encoder, texts: np.zeros((2, len(texts)), bool))
    source = tmp_path / "prompts.txt"
    with open(source, "w") as file:
        file.writelines(f"{number} " + "a red fox in the snow at night " * 60 + "\n" for number in range(8_000))
    size = source.stat().st_size
    embed_prompts(["a fox"], encoder)  # loads it
    tracemalloc.start()
    try:
        assert len(run(source, tmp_path / "v.npy", encoder, chunk=256)) == 8_000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size > 14e6 and peak < size / 5, f"{peak / 1e6:.1f} MB for a file of {size / 1e6:.1f} MB"
