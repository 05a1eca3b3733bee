"""Embeddings from files and into files; whatever does not fit is named."""

import sys

import numpy as np
import pytest

from sage.embed import Embeddings
from sage.embed_files import load_embeddings, save_embeddings

PROMPTS = ["a red fox", "a blue boat", "a red fox", "the moon"]


def unit(rows) -> np.ndarray:
    rows = np.asarray(rows, dtype=np.float64)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def vectors() -> np.ndarray:
    """Of length 1, equal for equal prompts."""
    return unit(np.random.default_rng(0).standard_normal((4, 6)))[[0, 1, 0, 3]]


def npy(tmp_path, array):
    path = tmp_path / "vectors.npy"
    np.save(path, array)
    return path


def parquet(tmp_path, prompts, rows, **columns):
    pa = pytest.importorskip("pyarrow", reason="Parquet files need pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "vectors.parquet"
    pq.write_table(pa.table({"prompt": prompts, "embedding": rows, **columns}), path)
    return path


def test_npy_of_unit_rows_is_mapped_as_it_is(tmp_path):
    found = load_embeddings(npy(tmp_path, vectors()), PROMPTS)
    assert isinstance(found, Embeddings) and isinstance(found.vectors, np.memmap) and not found.vectors.flags.writeable
    assert (found.vectors == vectors()).all() and found.vectors.dtype == np.float32
    assert found.unknown.dtype == bool and not found.unknown.any()
    assert found.encoder.startswith("file vectors.npy, sha256 ") and len(found.encoder.split()[-1]) == 12


def test_the_record_tells_files_apart(tmp_path):
    first = load_embeddings(npy(tmp_path, vectors()), PROMPTS).encoder
    assert load_embeddings(npy(tmp_path, vectors()), PROMPTS).encoder == first
    assert load_embeddings(npy(tmp_path, -vectors()), PROMPTS).encoder != first


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_rows_of_any_length_and_float_become_unit_rows(tmp_path, dtype, order):
    rows = np.asarray(vectors() * np.array([[3], [0.01], [3], [50]]), dtype=dtype, order=order)
    found = load_embeddings(npy(tmp_path, rows), PROMPTS).vectors
    assert found.dtype == np.float32 and found.dtype.isnative
    assert np.abs(found - unit(rows)).max() < 1e-7


def test_extreme_lengths_neither_overflow_nor_vanish(tmp_path):
    rows = vectors().astype(np.float64) * np.array([[1e300], [1e-300], [1e300], [1e-310]])
    assert np.abs(load_embeddings(npy(tmp_path, rows), PROMPTS).vectors - vectors()).max() < 1e-6


def broken(row: int, value: float) -> np.ndarray:
    rows = vectors()
    rows[row, 2] = value
    return rows


@pytest.mark.parametrize(("rows", "error", "message"), [
    (broken(1, np.nan), ValueError, r"prompts \[1\] hold NaN or infinity \(the first: 'a blue boat'\)"),
    (broken(3, -np.inf), ValueError, r"prompts \[3\] hold NaN or infinity"),
    (vectors() * [[1], [0], [1], [0]], ValueError, r"prompts \[1, 3\] are zero.*'a blue boat'"),
    (vectors()[:3], ValueError, r"must be \[4, d\], one row per prompt in their order, got \[3, 6\]"),
    (vectors().ravel(), ValueError, r"got \[24\]"),
    (vectors()[None], ValueError, r"got \[1, 4, 6\]"),
    (vectors()[:, :0], ValueError, "must be|cannot be read"),
    (np.ones((4, 6), dtype=np.int64), TypeError, "must hold float16, float32 or float64, got dtype int64"),
    (np.ones((4, 6), dtype=complex), TypeError, "got dtype complex128"),
    (np.ones((4, 6), dtype="S3"), TypeError, "got dtype .S3"),
    (np.ones(4, dtype=[("a", "f4")]), TypeError, "must hold float16"),
])
def test_unusable_arrays_are_named(tmp_path, rows, error, message):
    with pytest.raises(error, match=message):
        load_embeddings(npy(tmp_path, rows), PROMPTS)


class Trap:
    """Says so when it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was run",)


def test_pickled_objects_are_refused_unread(tmp_path):
    path = tmp_path / "vectors.npy"
    np.save(path, np.array([Trap()] * 4, dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="cannot be read as a .npy file of floats .*bjects"):
        load_embeddings(path, PROMPTS)
    import pickle

    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="cannot be read as a .npy file"):
        load_embeddings(path, PROMPTS)


@pytest.mark.parametrize("cut", [0, 4, 40, -8])
def test_truncated_npy_files_are_refused(tmp_path, cut):
    path = npy(tmp_path, vectors())
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match="cannot be read as a .npy file"):
        load_embeddings(path, PROMPTS)


def test_archives_under_a_false_name_are_refused(tmp_path):
    np.savez(tmp_path / "vectors.npz", vectors())
    (tmp_path / "vectors.npz").rename(tmp_path / "vectors.npy")
    with pytest.raises(ValueError, match="cannot be read as a .npy file"):
        load_embeddings(tmp_path / "vectors.npy", PROMPTS)


def test_wrong_names_and_missing_files(tmp_path):
    with pytest.raises(ValueError, match=r"path must end in .npy or .parquet, got '.*vectors.npz'"):
        load_embeddings(tmp_path / "vectors.npz", PROMPTS)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_embeddings(tmp_path / "vectors.npy", PROMPTS)
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(FileNotFoundError, match="is a folder"):
        load_embeddings(tmp_path / "folder.npy", PROMPTS)
    with pytest.raises(TypeError, match="prompts must be a sequence of str"):
        load_embeddings(tmp_path / "vectors.npy", "a fox")


def test_parquet_is_matched_by_text(tmp_path):
    path = parquet(tmp_path, ["the moon", "more", "a red fox", "a blue boat", "a red fox"],
                   [list(vectors()[row]) for row in (3, 1, 0, 1, 0)])
    found = load_embeddings(path, PROMPTS)
    assert np.abs(found.vectors - vectors()).max() < 1e-7 and not found.unknown.any()
    assert found.encoder.startswith("file vectors.parquet, sha256 ")


def test_parquet_of_other_list_and_text_types(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="Parquet files need pyarrow")
    texts = pa.array(PROMPTS).dictionary_encode()
    for kind in (pa.large_list(pa.float64()), pa.list_(pa.float32(), 6), pa.list_(pa.float16())):
        rows = pa.array([[np.float16(x) for x in row] for row in vectors()], pa.list_(pa.float16())).cast(kind)
        found = load_embeddings(parquet(tmp_path, texts, rows), PROMPTS).vectors
        assert np.abs(found - unit(vectors().astype(np.float16))).max() < 1e-6


ROWS = [[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [5.0, 6.0]]


@pytest.mark.parametrize(("prompts", "rows", "message"), [
    (["a red fox"], ROWS[:1], "lacks 2 of 3 distinct prompts: 'a blue boat', 'the moon'"),
    (PROMPTS, [[1.0, 2.0], [3.0, 4.0], [1.0, 2.5], [5.0, 6.0]], "rows 0 and 2 hold different embeddings of 'a red fox'"),
    (PROMPTS, [[1.0, 2.0], [3.0], [1.0, 2.0], [5.0, 6.0]], r"must be of one length, at least 1, got lengths \[1, 2\]"),
    (PROMPTS, [[1.0, 2.0], None, [1.0, 2.0], [5.0, 6.0]], "embedding in row 1 is missing"),
    (PROMPTS, [[1.0, 2.0], [None, 1.0], [1.0, 2.0], [5.0, 6.0]], "embedding in row 1 is missing or holds missing numbers"),
    (PROMPTS, [[1.0, 2.0], [np.nan, 1.0], [1.0, 2.0], [5.0, 6.0]], r"prompts \[1\] hold NaN"),
    (PROMPTS, [[0.0, 0.0], [3.0, 4.0], [0.0, 0.0], [5.0, 6.0]], r"prompts \[0, 2\] are zero"),
    (PROMPTS, [[1, 2]] * 4, 'column "embedding" must be lists of floats, got list<.*int64>'),
    (PROMPTS, [1.0] * 4, 'column "embedding" must be lists of floats, got double'),
    ([1, 2, 3, 4], ROWS, 'column "prompt" must be text, got int64'),
])
def test_unusable_parquet_is_named(tmp_path, prompts, rows, message):
    with pytest.raises(ValueError, match=message):
        load_embeddings(parquet(tmp_path, prompts, rows), PROMPTS)


def test_parquet_with_other_columns_or_bytes(tmp_path):
    path = parquet(tmp_path, PROMPTS, ROWS, unknown=["no"] * 4)
    with pytest.raises(ValueError, match='column "unknown" must be bool, got string'):
        load_embeddings(path, PROMPTS)
    whole = path.read_bytes()
    for data in (b"", b"PAR1", whole[:-10], whole[:4] + bytes(len(whole) - 12) + whole[-8:]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="cannot be read as a Parquet file"):
            load_embeddings(path, PROMPTS)
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": PROMPTS}), path)
    with pytest.raises(ValueError, match='must have the columns "prompt" and "embedding", got text'):
        load_embeddings(path, PROMPTS)


def test_without_pyarrow_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "vectors.parquet").write_bytes(b"PAR1")
    with pytest.raises(ModuleNotFoundError, match=r"load_embeddings: .*pip install \"sage-diffusion\[grouping\]\""):
        load_embeddings(tmp_path / "vectors.parquet", PROMPTS)
    with pytest.raises(ModuleNotFoundError, match="save_embeddings: .*pip install"):
        save_embeddings(tmp_path / "vectors.parquet", PROMPTS, vectors())


@pytest.mark.parametrize("name", ["vectors.npy", "vectors.parquet"])
def test_what_is_saved_is_loaded_to_the_bit(tmp_path, name):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="Parquet files need pyarrow")
    path = tmp_path / name
    path.write_text("an older file")
    save_embeddings(path, PROMPTS, Embeddings(vectors(), "mine", np.zeros(4, dtype=bool)))
    assert load_embeddings(path, PROMPTS).vectors.tobytes() == vectors().tobytes()
    save_embeddings(path, PROMPTS, vectors() * 2)
    assert np.abs(load_embeddings(path, PROMPTS).vectors - vectors()).max() < 1e-7
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_unknown_prompts_survive_in_parquet_only(tmp_path):
    embeddings = Embeddings(vectors(), "mine", np.array([False, True, False, False]))
    with pytest.warns(UserWarning, match="1 of 4 prompts are unknown .*save a .parquet file"):
        save_embeddings(tmp_path / "vectors.npy", PROMPTS, embeddings)
    pytest.importorskip("pyarrow", reason="Parquet files need pyarrow")
    save_embeddings(tmp_path / "vectors.parquet", PROMPTS, embeddings)
    assert load_embeddings(tmp_path / "vectors.parquet", PROMPTS).unknown.tolist() == [False, True, False, False]


@pytest.mark.parametrize(("rows", "message"), [
    (broken(1, np.nan), r"save_embeddings: the embeddings of prompts \[1\] hold NaN"),
    (vectors().astype(np.float64) * 1e300, r"prompts \[0, 1, 2, 3\] hold NaN or infinity"),  # as float32
    (vectors()[:2], r"must be \[4, d\]"),
    (unit(np.arange(24).reshape(4, 6) + 1.0), "rows 0 and 2 of 'a red fox' differ"),
])
def test_unusable_embeddings_are_not_saved(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        save_embeddings(tmp_path / "vectors.npy", PROMPTS, rows)
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = npy(tmp_path, vectors())

    def fail(file, array, **options):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_embeddings(path, PROMPTS, -vectors())
    assert (load_embeddings(path, PROMPTS).vectors == vectors()).all() and list(tmp_path.iterdir()) == [path]
