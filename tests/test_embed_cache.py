"""Embeddings kept on disk: the same bits as the run that filled the cache, whatever happens to the file."""

import contextlib
import os
import sqlite3
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_embed import PROMPTS, WORDS, build_bert, build_clip, build_t5, build_tokenizer, save

from sage import embed, embed_cache
from sage.embed import embed_prompts
from sage.embed_cache import cache_info, clear_cache, default_folder

LONG = " ".join(["fox"] * 45)
MIXED = [*PROMPTS, LONG, "ein roter Fuchs", "", LONG + " moon"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("encoder"), build_bert())


@pytest.fixture
def embedded(monkeypatch):
    """The prompts that were really embedded, call by call."""
    seen = []
    real = embed.distinct_vectors
    monkeypatch.setattr(embed, "distinct_vectors", lambda encoder, prompts, *rest: seen.append(prompts) or real(encoder, prompts, *rest))
    return seen


def file_of(folder) -> Path:
    found, = Path(folder).glob("*.sqlite")
    return found


def quiet(prompts, encoder, **options):
    """Embeddings, and the texts of the warnings of this call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = embed_prompts(prompts, encoder, **options)
    assert all(warning.filename == __file__ for warning in caught if "embedding cache" in str(warning.message))
    return found, [str(warning.message) for warning in caught]


def test_warm_and_cold_are_equal_to_the_bit_warnings_included(encoder, tmp_path, embedded):
    plain, said = quiet(MIXED, encoder)
    cold, said_cold = quiet(MIXED, encoder, cache=tmp_path)
    warm, said_warm = quiet(MIXED, encoder, cache=str(tmp_path))
    for found in (cold, warm):
        assert found.vectors.tobytes() == plain.vectors.tobytes() and found.vectors.dtype == np.float32
        assert found.unknown.dtype == bool and (found.unknown == plain.unknown).all() and found.encoder == plain.encoder
    assert said == said_cold == said_warm and len(said) == 2
    assert "2 of 9 prompts are longer than the 40 tokens" in said[0] and "2 of 9 prompts are mostly unknown" in said[1]
    assert embedded == [sorted(set(MIXED))] * 2


def test_only_new_prompts_are_embedded_and_old_ones_stay_as_they_were(encoder, tmp_path, embedded):
    rng = np.random.default_rng(0)
    prompts = [" ".join(rng.choice(WORDS, rng.integers(1, 30))) for _ in range(40)]
    first = embed_prompts(prompts[:25], encoder, cache=tmp_path).vectors
    both = embed_prompts(prompts[::-1], encoder, cache=tmp_path).vectors[::-1]
    assert embedded[1] == sorted(set(prompts) - set(prompts[:25]))
    assert (both[:25] == first).all()
    order = rng.permutation(40)
    again = embed_prompts([prompts[i] for i in order], encoder, cache=tmp_path).vectors
    assert (again == both[order]).all() and len(embedded) == 2
    assert np.abs(both - embed_prompts(prompts, encoder).vectors).max() < 2e-6


def test_a_full_cache_does_not_load_the_encoder(encoder, tmp_path, monkeypatch):
    cold = embed_prompts(PROMPTS, encoder, cache=tmp_path)
    monkeypatch.setattr("sage.encoders._load", lambda *args: pytest.fail("the encoder was loaded"))
    warm = embed_prompts(PROMPTS, encoder, cache=tmp_path)
    assert (warm.vectors == cold.vectors).all() and warm.encoder == cold.encoder


def test_without_a_cache_nothing_is_written(encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("SAGE_CACHE_DIR", str(tmp_path))
    for cache in (None, False):
        embed_prompts(PROMPTS, encoder, cache=cache)
    assert not list(tmp_path.iterdir())


def test_the_usual_folder(encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("SAGE_CACHE_DIR", raising=False)
    assert default_folder() == tmp_path / "xdg" / "sage-diffusion" / "embeddings"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache" / "sage-diffusion" / "embeddings"
    monkeypatch.setenv("SAGE_CACHE_DIR", str(tmp_path / "mine"))
    assert default_folder() == tmp_path / "mine" / "embeddings"
    embed_prompts(PROMPTS, encoder, cache=True)
    assert file_of(default_folder()) and cache_info().prompts == 4


def test_prompts_are_not_in_the_file(encoder, tmp_path):
    embed_prompts(["a red painting"], encoder, cache=tmp_path)
    assert b"painting" not in file_of(tmp_path).read_bytes()


def test_info_and_clearing(encoder, tmp_path):
    assert cache_info(tmp_path / "none") == embed_cache.CacheInfo(tmp_path / "none", 0, 0, 0)
    embed_prompts(PROMPTS, encoder, cache=tmp_path)
    (tmp_path / "mine.sqlite").write_text("not a file of the cache")
    bad = tmp_path / ("0" * 64 + ".sqlite")
    bad.write_bytes(b"garbage " * 100)
    info = cache_info(tmp_path)
    assert (info.files, info.prompts, info.unreadable) == (2, 4, (bad.name,))
    assert info.bytes == sum(file.stat().st_size for file in tmp_path.glob("?" * 64 + ".sqlite"))
    assert clear_cache(tmp_path) == info
    assert [file.name for file in tmp_path.iterdir()] == ["mine.sqlite"]


@pytest.mark.parametrize("cache", [3, "", 1.5, ["a"]])
def test_a_cache_that_is_no_folder_is_refused(encoder, cache):
    with pytest.raises(TypeError, match="cache must be a folder, True, False or None, got"):
        embed_prompts(PROMPTS, encoder, cache=cache)


# Damage: in every case the vectors are right, a warning says what happened, and the next run is warm again.


def check_healing(encoder, folder, embedded, message, again):
    """Embed with a damaged cache; `again` are the prompts that had to be embedded once more."""
    plain = embed_prompts(PROMPTS, encoder).vectors
    embedded.clear()
    found, said = quiet(PROMPTS, encoder, cache=folder)
    assert np.abs(found.vectors - plain).max() < 2e-6 and embedded == [sorted(again)]
    assert [text for text in said if message in text] == said[:1] and len(said) == 1, said
    found_again, said = quiet(PROMPTS, encoder, cache=folder)
    assert (found_again.vectors == found.vectors).all() and len(embedded) == 1 and not said


def change(folder, statement, *values):
    with contextlib.closing(sqlite3.connect(file_of(folder))) as db, db:
        db.execute(statement, values)


@pytest.mark.parametrize("kept", [600, 1000, 4096, 5000, 8192])
def test_a_truncated_file_is_built_anew(encoder, tmp_path, embedded, kept):
    embed_prompts(PROMPTS, encoder, cache=tmp_path)
    file_of(tmp_path).write_bytes(file_of(tmp_path).read_bytes()[:kept])
    check_healing(encoder, tmp_path, embedded, "it is built anew", set(PROMPTS))


def test_a_file_that_lacks_its_last_bytes_loses_one_vector(encoder, tmp_path, embedded):
    embed_prompts(PROMPTS, encoder, cache=tmp_path)
    file_of(tmp_path).write_bytes(file_of(tmp_path).read_bytes()[:-3])
    check_healing(encoder, tmp_path, embedded, "1 of 4 vectors", {"a blue boat at night"})


@pytest.mark.parametrize("left", [b"", b"x"])
def test_an_emptied_file_is_a_new_one(encoder, tmp_path, embedded, left):
    embed_prompts(PROMPTS, encoder, cache=tmp_path)
    file_of(tmp_path).write_bytes(left)
    embedded.clear()
    for _ in range(2):
        embed_prompts(PROMPTS, encoder, cache=tmp_path)
    assert len(embedded) == 1


@pytest.mark.parametrize("garbage", [b"garbage " * 2000, b"SQLite format 3\0" + b"\xff" * 9000])
def test_garbage_is_built_anew(encoder, tmp_path, embedded, garbage):
    embed_prompts(PROMPTS, encoder, cache=tmp_path)
    file_of(tmp_path).write_bytes(garbage)
    check_healing(encoder, tmp_path, embedded, "it is built anew", set(PROMPTS))


def test_a_flipped_byte_in_a_vector_costs_that_vector_only(encoder, tmp_path, embedded):
    vector = embed_prompts(PROMPTS, encoder, cache=tmp_path).vectors[3].tobytes()
    data = bytearray(file_of(tmp_path).read_bytes())
    data[data.index(vector) + 50] ^= 4
    file_of(tmp_path).write_bytes(data)
    check_healing(encoder, tmp_path, embedded, "1 of 4 vectors", {PROMPTS[3]})


@pytest.mark.parametrize("seed", range(40))
def test_flipped_bytes_anywhere_never_give_a_wrong_vector(encoder, tmp_path, seed):
    plain = embed_prompts(PROMPTS, encoder, cache=tmp_path).vectors
    rng = np.random.default_rng(seed)
    data = bytearray(file_of(tmp_path).read_bytes())
    where = np.flatnonzero(np.frombuffer(bytes(data), np.uint8))
    for place in rng.choice(where, 1 + seed % 4):
        data[place] ^= int(rng.integers(1, 256))
    file_of(tmp_path).write_bytes(data)
    for _ in range(2):
        found, _ = quiet(PROMPTS, encoder, cache=tmp_path)
        assert np.abs(found.vectors - plain).max() < 2e-6 and not found.unknown.any()


def test_vectors_of_another_length_are_embedded_again(encoder, tmp_path, embedded):
    embed_prompts(PROMPTS, encoder, cache=tmp_path)
    key, data = embed_cache._key(PROMPTS[3]), np.ones(16, "<f4").tobytes()
    change(tmp_path, "UPDATE vectors SET vector = ?, crc = ? WHERE key = ?", data, embed_cache._checksum(key, data, 0), key)
    check_healing(encoder, tmp_path, embedded, "1 of 4 vectors", {PROMPTS[3]})


def test_a_file_of_vectors_of_another_length_is_built_anew(encoder, tmp_path, embedded):
    embed_prompts(["a red fox"], encoder, cache=tmp_path)
    store = embed_cache.VectorStore(file_of(tmp_path), file_of(tmp_path).stem)
    file_of(tmp_path).unlink()
    store.write(["a red fox"], np.ones((1, 16), np.float32), np.zeros(1, bool), np.zeros(1, bool), 40)
    plain = embed_prompts(PROMPTS, encoder).vectors
    found, said = quiet(PROMPTS, encoder, cache=tmp_path)
    assert (found.vectors == plain).all() and len(said) == 1 and "vectors of another length" in said[0]
    assert cache_info(tmp_path).prompts == 4


@pytest.mark.parametrize(("statement", "message"), [
    ("DROP TABLE about", "other tables"),
    ("CREATE TABLE more (a)", "other tables"),
    ("ALTER TABLE vectors RENAME COLUMN crc TO sum", "other tables"),
    ("UPDATE about SET format = 99", "does not say that it belongs"),
    ("UPDATE about SET token_limit = 7", "does not say that it belongs"),
    ("UPDATE about SET identity = 'x'", "does not say that it belongs"),
    ("DELETE FROM about", "does not say that it belongs"),
])
def test_another_schema_is_built_anew(encoder, tmp_path, embedded, statement, message):
    embed_prompts(PROMPTS, encoder, cache=tmp_path)
    change(tmp_path, statement)
    check_healing(encoder, tmp_path, embedded, message, set(PROMPTS))


def test_a_file_of_another_encoder_is_built_anew(encoder, tmp_path, embedded):
    embed_prompts(PROMPTS, encoder, cache=tmp_path)
    right = file_of(tmp_path)
    other = save(tmp_path / "other", build_bert(positions=30))
    embed_prompts(PROMPTS, other, cache=tmp_path / "others")
    file_of(tmp_path / "others").replace(right)
    check_healing(encoder, tmp_path, embedded, "does not say that it belongs", set(PROMPTS))


def test_a_folder_that_cannot_be_made_is_said_and_done_without(encoder, tmp_path):
    (tmp_path / "file").touch()
    plain = embed_prompts(PROMPTS, encoder).vectors
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper"):
        found, said = quiet(PROMPTS, encoder, cache=folder)
        assert (found.vectors == plain).all() and len(said) == 1 and "cannot be made" in said[0] and "without it" in said[0]


def test_a_file_that_cannot_be_opened_or_written_is_said_and_left(encoder, tmp_path, monkeypatch):
    embed_prompts(PROMPTS[:1], encoder, cache=tmp_path)
    real = embed_cache._connect

    def read_only(path):
        db = real(path)
        db.execute("PRAGMA query_only = ON")
        return db

    monkeypatch.setattr(embed_cache, "_connect", read_only)
    _, said = quiet(PROMPTS, encoder, cache=tmp_path)
    assert len(said) == 1 and "cannot be written" in said[0] and "goes on without it" in said[0]
    monkeypatch.undo()
    assert cache_info(tmp_path).prompts == 1
    path = file_of(tmp_path)
    path.unlink()
    path.mkdir()
    _, said = quiet(PROMPTS, encoder, cache=tmp_path)
    assert [word in text for word, text in zip(("cannot be read", "cannot be written"), said, strict=True)] == [True, True]


def test_a_writer_waits_for_another(encoder, tmp_path, monkeypatch):
    embed_prompts(PROMPTS[:1], encoder, cache=tmp_path)
    monkeypatch.setattr(embed_cache, "PATIENCE", 0.2)
    with contextlib.closing(sqlite3.connect(file_of(tmp_path), isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        found, said = quiet(PROMPTS, encoder, cache=tmp_path)
        assert len(said) == 1 and "cannot be written (database is locked)" in said[0]
    assert (found.vectors[0] == embed_prompts(PROMPTS[:1], encoder, cache=tmp_path).vectors[0]).all()


WRITER = """
import sys, numpy as np
from pathlib import Path
from sage.embed_cache import VectorStore
path, number = Path(sys.argv[1]), int(sys.argv[2])
store = VectorStore(path, path.stem)
for batch in range(12):
    prompts = [f"prompt {(number * 60 + batch * 10 + i) % 150}" for i in range(10)]
    vectors = np.array([np.full(8, int(prompt.split()[1]), np.float32) for prompt in prompts])
    store.write(prompts, vectors, np.zeros(10, bool), np.ones(10, bool), 77)
    assert set(store.read(prompts)) == set(prompts)
"""


def test_processes_write_at_once(tmp_path):
    path = tmp_path / ("a" * 64 + ".sqlite")
    command = [sys.executable, "-W", "error", "-c", WRITER, str(path)]
    running = [subprocess.Popen([*command, str(number)], stderr=subprocess.PIPE, text=True) for number in range(2)]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    store = embed_cache.VectorStore(path, path.stem)
    entries = store.read([f"prompt {number}" for number in range(150)])
    assert len(entries) == 150 and store.limit == 77
    assert all((entry.vector == int(prompt.split()[1])).all() and entry.cut and not entry.unknown for prompt, entry in entries.items())


def test_a_process_that_is_killed_leaves_what_was_there(encoder, tmp_path):
    embed_prompts(PROMPTS[:1], encoder, cache=tmp_path)
    script = ("import os, sqlite3, sys\n"
              "db = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
              "db.execute('PRAGMA cache_spill = ON'); db.execute('PRAGMA cache_size = 2'); db.execute('BEGIN IMMEDIATE')\n"
              "db.executemany('INSERT INTO vectors VALUES (NULL, ?, ?, 0, 0)', [(os.urandom(32), bytes(4000)) for _ in range(200)])\n"
              "os._exit(9)\n")
    assert subprocess.run([sys.executable, "-c", script, str(file_of(tmp_path))], check=False).returncode == 9
    assert cache_info(tmp_path).prompts == 1
    assert quiet(PROMPTS, encoder, cache=tmp_path)[1] == [] and cache_info(tmp_path).prompts == 4


# Encoders: each has a file of its own, and what changes its vectors makes it another.


def test_other_files_are_another_encoder(tmp_path):
    folder = Path(save(tmp_path / "encoder", build_bert()))
    vectors = [embed_prompts(PROMPTS, str(folder), cache=tmp_path / "cache").vectors]
    (folder / "README.md").write_text("is not read")
    embed_prompts(PROMPTS, str(folder), cache=tmp_path / "cache")
    assert cache_info(tmp_path / "cache").files == 1
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    vectors.append(embed_prompts(PROMPTS, str(folder), cache=tmp_path / "cache").vectors)
    other = build_bert()
    other.embeddings.LayerNorm.weight.data *= 2
    save(folder, other)
    vectors.append(embed_prompts(PROMPTS, str(folder), cache=tmp_path / "cache").vectors)
    assert cache_info(tmp_path / "cache").files == 3
    for one, two in ((0, 1), (1, 2), (0, 2)):
        assert np.abs(vectors[one] - vectors[two]).max() > 1e-3


def test_a_copied_folder_is_the_same_encoder(encoder, tmp_path, embedded):
    import shutil

    embed_prompts(PROMPTS, encoder, cache=tmp_path / "cache")
    copy = shutil.copytree(encoder, tmp_path / "copy")
    assert embed_prompts(PROMPTS, str(copy), cache=tmp_path / "cache").encoder == str(copy)
    assert len(embedded) == 1


def pipeline(model, tokenizer=None):
    return SimpleNamespace(text_encoder=model, tokenizer=tokenizer or build_tokenizer())


@pytest.mark.parametrize("build", [build_clip, build_bert, build_t5])
def test_text_encoders_of_pipelines(tmp_path, build, embedded):
    pipe = pipeline(build())
    cold = embed_prompts(PROMPTS, "pipeline", pipe, cache=tmp_path)
    warm = embed_prompts(PROMPTS, "pipeline", pipe, cache=tmp_path)
    assert (warm.vectors == cold.vectors).all() and warm.encoder == cold.encoder
    assert len(embedded) == 1
    embed_prompts(PROMPTS, "pipeline", pipeline(build()), cache=tmp_path)
    assert cache_info(tmp_path).files == 1


def test_changed_weights_dtype_or_vocabulary_are_another_encoder(tmp_path):
    model = build_bert()
    embed_prompts(PROMPTS, "pipeline", pipeline(model), cache=tmp_path)
    model.encoder.layer[0].output.dense.weight.data += 0.01  # as an adapter that is merged
    embed_prompts(PROMPTS, "pipeline", pipeline(model), cache=tmp_path)
    embed_prompts(PROMPTS, "pipeline", pipeline(model.bfloat16()), cache=tmp_path)
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<mine>"])
    embed_prompts(PROMPTS, "pipeline", pipeline(model, tokenizer), cache=tmp_path)
    assert cache_info(tmp_path).files == 4


def test_one_changed_number_or_another_token_of_the_same_place_is_another_encoder(tmp_path):
    """As when a textual inversion is replaced by another one."""
    model, tokenizer = build_bert(), build_tokenizer()
    embed_prompts(PROMPTS, "pipeline", pipeline(model, tokenizer), cache=tmp_path)
    with torch.no_grad():
        model.get_input_embeddings().weight[3, 1] += 0.5
    embed_prompts(PROMPTS, "pipeline", pipeline(model, tokenizer), cache=tmp_path)
    for number, token in enumerate(("<mine>", "<yours>")):
        tokenizer = build_tokenizer()
        tokenizer.add_tokens([token])
        embed_prompts(PROMPTS, "pipeline", pipeline(model, tokenizer), cache=tmp_path)
        assert cache_info(tmp_path).files == 3 + number


def test_the_identity_is_that_of_another_process(tmp_path):
    """Nothing of the order of a set, of an address or of a path goes into it."""
    script = ("import sys, warnings\n"
              "sys.path.insert(0, sys.argv[1])\n"
              "from test_embed_cache import *\n"
              "embed_prompts(PROMPTS, 'pipeline', pipeline(build_bert()), cache=sys.argv[2])\n")
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": "1"})
    embed_prompts(PROMPTS, "pipeline", pipeline(build_bert()), cache=tmp_path)
    assert cache_info(tmp_path).files == 1


def test_encoders_with_adapters_or_without_weights_are_not_cached(tmp_path):
    peft = pytest.importorskip("peft")
    model = build_bert()
    plain = embed_prompts(PROMPTS, "pipeline", pipeline(build_bert())).vectors
    model.add_adapter(peft.LoraConfig(target_modules=["query"], init_lora_weights=True))
    found, said = quiet(PROMPTS, "pipeline", pipe=pipeline(model), cache=tmp_path)
    assert np.abs(found.vectors - plain).max() < 2e-6
    assert len(said) == 1 and "adapters are loaded into BertModel" in said[0] and "goes on without it" in said[0]
    assert not cache_info(tmp_path).files


def test_offloaded_weights_are_not_hashed():
    from sage.encoder_identity import Unidentified, model_identity

    model = build_bert()
    model.embeddings.to("meta")
    with pytest.raises(Unidentified, match="embeddings.* of BertModel is offloaded or quantized"):
        model_identity(model, build_tokenizer(), 40, 2)


def test_a_cached_call_leaves_the_random_numbers_alone(encoder, tmp_path):
    state = torch.get_rng_state()
    for _ in range(2):
        embed_prompts(PROMPTS, encoder, cache=tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
