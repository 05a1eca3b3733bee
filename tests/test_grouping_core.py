"""The grouping core against the plain specification of tests/grouping_spec.py: any order, tiles, threads, rounds and build."""

import random
import time

import grouping_spec as spec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_grouping import cases, random_vectors

import sage.grouping
import sage_kernels.grouping as core
from sage.cells import cell_edges, find_cells
from sage.embed import Embeddings
from sage.grouping import find_groups, group
from sage.similarity import all_pairs, on_grid
from sage.threshold_graph import Bounds, Products, exact_edges, similarity_counts

BUILT = pytest.mark.skipif(core.refusal is not None, reason=f"no compiled grouping core: {core.refusal}")


@pytest.fixture(params=[pytest.param("compiled", marks=BUILT), "python"])
def engine(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(core, "core", None)


def keys_of(vectors: np.ndarray) -> list[str]:
    return [f"{i % 5} {i}" for i in range(len(vectors))]


def edges_of(products: Products, least: int) -> set[tuple[int, int, int]]:
    nodes = np.arange(len(products.grid), dtype=np.int32)
    found = [tuple(edge) for part in exact_edges(products, nodes, least) for edge in part.tolist()]
    assert len(found) == len(set(found))
    return set(found)


def clouds(count: int, width: int, centres: int, spread: float, seed: int = 0) -> np.ndarray:
    """Vectors about some directions."""
    rng = np.random.default_rng(seed)
    middle = rng.standard_normal((centres, width))
    middle /= np.linalg.norm(middle, axis=1, keepdims=True)
    return (middle[rng.integers(0, centres, count)] + rng.standard_normal((count, width)) * spread / width**0.5).astype(np.float32)


@given(**cases)
@settings(max_examples=60, deadline=None)
def test_groups_are_those_of_the_specification(seed, similarity, max_size):
    vectors = random_vectors(seed, 14)
    keys = keys_of(vectors)
    assert group(vectors, keys, similarity, max_size) == spec.groups(vectors, keys, similarity, max_size)


@given(**cases)
@settings(max_examples=60, deadline=None)
def test_dendrograms_are_those_of_the_specification(seed, similarity, max_size):
    vectors = random_vectors(seed, 14)
    keys = keys_of(vectors)
    wanted = {(frozenset(kept), frozenset(gone), height) for kept, gone, height in spec.merges(vectors, keys, similarity, max_size)}
    found = set()
    for members, merges in find_groups(vectors, keys, similarity, max_size).groups:
        cluster = {member: frozenset([member]) for member in members}
        for a, b, height in merges:
            found.add((cluster[a], cluster[b], height))
            cluster.update(dict.fromkeys(cluster[a] | cluster[b], cluster[a] | cluster[b]))
    assert found == wanted


@pytest.mark.parametrize("seed", range(20))
def test_python_and_compiled_code_and_any_tiles_and_threads_agree(seed, monkeypatch):
    vectors = random_vectors(seed, 60)
    keys, similarity = keys_of(vectors), [-0.5, 0.3, 0.6, 0.9][seed % 4]
    whole = find_groups(vectors, keys, similarity, 5)
    for tile, threads in (((7, 3), 1), ((1, 60), 3), ((64, 2), 2)):
        monkeypatch.setattr("sage.threshold_graph.TILE", tile)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert find_groups(vectors, keys, similarity, 5) == whole
    monkeypatch.setattr(core, "core", None)
    assert find_groups(vectors, keys, similarity, 5) == whole


@pytest.mark.parametrize("seed", range(12))
def test_rounds_change_no_group(seed, monkeypatch):
    vectors = clouds(300, 16, 6, [0.1, 0.5, 0.9][seed % 3], seed)
    keys, cap = keys_of(vectors), [2, 5, 8, 40][seed % 4]
    whole = find_groups(vectors, keys, 0.5, cap)
    monkeypatch.setattr(sage.grouping, "EDGES_A_ROUND", 500)
    monkeypatch.setattr(sage.grouping, "EDGES_PER_PROMPT", 0)
    monkeypatch.setattr(sage.grouping, "MOST_EDGES", 40_000)
    parts = find_groups(vectors, keys, 0.5, cap)
    assert whole.rounds == 1 and parts.rounds > 1
    assert sorted(parts.groups) == sorted(whole.groups)


def test_more_edges_than_fit_are_refused(monkeypatch):
    monkeypatch.setattr(sage.grouping, "MOST_EDGES", 100)
    with pytest.raises(RuntimeError, match="more than 100 pairs of prompts are at least 0.6 alike.*higher similarity"):
        find_groups(clouds(60, 8, 1, 0.1), [str(i) for i in range(60)], 0.6, 60)


def test_equal_vectors_fill_groups_without_an_edge_each(engine):
    vectors = np.concatenate([np.ones((3000, 4)), np.eye(4)[:1], np.ones((1, 4)) + 1e-9]).astype(np.float64)
    found = find_groups(vectors, [f"{i:05}" for i in range(3002)], 0.9, 8)
    assert sorted(len(members) for members, _ in found.groups) == [1, 1] + [8] * 375
    assert found.num_edges < 100


def test_all_equal_prompts_of_a_large_set():
    count = 50_000
    found = find_groups(np.ones((count, 3), np.float32), [f"{i:05}" for i in range(count)], 0.6, 8)
    assert [len(members) for members, _ in found.groups] == [8] * (count // 8)
    assert sorted(found.groups[0].members) == list(range(8))


def test_every_edge_is_found_and_exact(engine):
    vectors = clouds(700, 33, 40, 0.8)
    grid, alike = on_grid(vectors, "vectors"), spec.similarities(vectors)
    assert (all_pairs(grid) == alike).all()
    for least in (-200_000, 300_000, 900_000):
        rows, cols = np.nonzero(np.triu(alike >= least, 1))
        wanted = set(zip(rows.tolist(), cols.tolist(), alike[rows, cols].tolist(), strict=True))
        assert edges_of(Products(grid), least) == wanted
        assert edges_of(Products(grid, tile=(100, 33)), least) == wanted


def test_pairs_within_the_rounding_of_a_float32_product_are_told_apart():
    """Hundreds of pairs around the threshold, closer than float32 sums of 384 products can tell."""
    rng = np.random.default_rng(3)
    base, other = np.linalg.qr(rng.standard_normal((384, 2)))[0].T
    angles = np.arccos(0.6) + rng.uniform(-3e-6, 3e-6, 500)
    vectors = np.concatenate([base[None], np.cos(angles)[:, None] * base + np.sin(angles)[:, None] * other])
    alike = spec.similarities(vectors)
    with_base = {col: similarity for row, col, similarity in edges_of(Products(on_grid(vectors, "v")), 600_000) if row == 0}
    assert with_base == {col: int(alike[0, col]) for col in range(1, 501) if alike[0, col] >= 600_000}
    assert 100 < len(with_base) < 400


class ShortFactors(Products):
    """Products that keep `bits` bits of their factors, cut off, as tensor cores may."""

    bits = 10

    def tile(self, rows, cols):
        return super().tile(self.cut(rows), self.cut(cols))

    def cut(self, x):
        return (x.contiguous().view(torch.int32) >> (23 - self.bits) << (23 - self.bits)).view(torch.float32)


@pytest.mark.parametrize("bits", [10, 7])
def test_matrix_products_of_short_factors_lose_no_edge(bits, monkeypatch):
    monkeypatch.setattr(ShortFactors, "bits", bits)
    grid = on_grid(clouds(1500, 40, 60, 0.8), "v")
    products = ShortFactors(grid)
    assert products.factor_bits == bits and Products(grid).factor_bits == 22
    wanted = edges_of(Products(grid), 600_000)
    assert edges_of(products, 600_000) == wanted
    monkeypatch.setattr(ShortFactors, "floor", Products(grid).floor)
    assert edges_of(products, 600_000) != wanted  # the allowance is what keeps them


def test_products_that_keep_too_little_are_refused(monkeypatch):
    monkeypatch.setattr(ShortFactors, "bits", 4)
    with pytest.raises(RuntimeError, match="keep less than 7 bits"):
        ShortFactors(on_grid(np.eye(4), "v"))


@pytest.mark.parametrize("width", [1, 8, 32, 64])
@pytest.mark.parametrize("spread", [0.3, 0.9])
def test_short_rows_bound_the_similarity(width, spread, monkeypatch):
    """Whatever width is chosen: vectors along few directions, and such whose rest is most of them."""
    vectors = clouds(1600, 80, 12, spread)
    grid = on_grid(vectors, "v")
    monkeypatch.setattr("sage.threshold_graph._best_width", lambda products, nodes, directions, least: width)
    products, nodes = Products(grid), np.arange(1600, dtype=np.int32)
    bounds = Bounds(products, nodes, 500_000)
    assert bounds.rows.shape == (1600, width + 1)
    tile, alike = products.tile(bounds.rows, bounds.rows).double().numpy(), all_pairs(grid) / 1e6
    assert (tile > alike - 3e-6).all()
    rows, cols = np.nonzero(np.triu(alike >= 0.5, 1))
    assert {(row, col) for row, col, _ in edges_of(products, 500_000)} == set(zip(rows.tolist(), cols.tolist(), strict=True))
    bounds.rows[:, -1] = 0
    without_rest = products.tile(bounds.rows, bounds.rows).double().numpy()
    assert width > 8 or ((without_rest < 0.49) & (alike > 0.5)).any()  # it is the rest that makes it a bound


def test_the_default_dtype_and_precision_settings_of_torch_do_not_matter():
    vectors, keys = clouds(300, 16, 9, 0.8), [f"{i:03}" for i in range(300)]
    wanted = find_groups(vectors, keys, 0.6, 5)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert find_groups(vectors, keys, 0.6, 5) == wanted
    finally:
        torch.set_default_dtype(before)


def test_equal_vectors_are_wholly_alike_in_any_number_of_dimensions():
    for width in (1, 3, 1000, 3015):
        vectors = np.ones((3, width))
        assert (all_pairs(on_grid(vectors, "v")) == 1_000_000).all()
        assert group(vectors, list("abc"), 1.0, 4) == [(0, 1, 2)]
        assert group(vectors, list("abc"), 1.0, 2) == [(0, 1), (2,)]


def test_counts_of_a_sample_tell_how_many_edges_there_are():
    products = Products(on_grid(clouds(3000, 32, 60, 0.7), "v"))
    nodes, levels = np.arange(3000, dtype=np.int32), np.array([300_000, 600_000, 800_000])
    counts = similarity_counts(products, nodes, levels)
    real = np.array([len(edges_of(products, int(level))) for level in levels])
    assert np.abs(counts / real - 1).max() < 0.2
    assert (similarity_counts(products, nodes[:300], levels, sample=300) == [
        sum(len(part) for part in exact_edges(products, nodes[:300], int(level))) for level in levels
    ]).all()


def test_linkage_takes_edges_in_any_order_and_in_parts(engine):
    edges = np.array([[0, 1, 9], [0, 2, 7], [1, 2, 8], [3, 4, 9], [2, 3, 5]], dtype=np.int32)
    wanted = [[0, 1, 9], [3, 4, 9], [0, 2, 7]]
    for seed in range(5):
        shuffled = edges[random.Random(seed).sample(range(5), 5)]
        assert core.complete_linkage(5, [shuffled], 8).tolist() == wanted
        assert core.complete_linkage(5, [shuffled[:3], shuffled[2:], edges[:0]], 8).tolist() == wanted
    assert core.complete_linkage(5, [edges], 2).tolist() == wanted[:2]
    assert core.complete_linkage(5, [], 2).tolist() == []


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([[1, 0, 5]], "0 <= row < col < n"),
        ([[0, 3, 5]], "0 <= row < col < n"),
        ([[0, 1, 5], [0, 1, 6]], "a pair must have one similarity"),
        ([[0, 1]], r"edges must be arrays \[m, 3\], got \[1, 2\]"),
    ],
)
def test_linkage_refuses_what_is_no_graph(engine, edges, message):
    with pytest.raises(ValueError, match=message):
        core.complete_linkage(3, [np.array(edges, dtype=np.int32)], 8)


def test_core_refuses_arrays_that_do_not_fit(engine):
    grid, tile, rows = np.ones((4, 2), np.int32), np.ones((2, 4), np.float32), np.arange(2)
    squares = core.squares_of(grid)
    with pytest.raises(ValueError, match=r"tile must be float32 \[2, 3\]"):
        core.tile_pairs(tile, grid, squares, rows, np.arange(3), 0.0, 0)
    with pytest.raises(ValueError, match="col_numbers must be indices .m. below 4, got 1 to 4"):
        core.tile_pairs(tile, grid, squares, rows, np.arange(1, 5), 0.0, 0)
    with pytest.raises(ValueError, match="grid must be int32"):
        core.similarities(grid.astype(float), squares, rows, rows)
    with pytest.raises(ValueError, match="equally many, got 2 and 1"):
        core.similarities(grid, squares, rows, rows[:1])
    with pytest.raises(ValueError, match=r"squares must be int64 \[4\], got int64 \[3\]"):
        core.similarities(grid, squares[:3], rows, rows)
    with pytest.raises(ValueError, match="rows must be indices .m. below 4, got 0 to 4294967297"):
        core.similarities(grid, squares, np.array([0, 2**32 + 1]), rows)
    with pytest.raises(ValueError, match="max_size must be at least 1, got 0"):
        core.complete_linkage(3, [], 0)


def test_approximate_search_keeps_the_bound_and_says_its_recall():
    pytest.importorskip("faiss", reason="faiss is not installed")
    vectors = clouds(6000, 64, 300, 0.75)
    keys = [f"{i:05}" for i in range(6000)]
    exact = find_groups(vectors, keys, 0.6, 8)
    found = find_groups(vectors, keys, 0.6, 8, search="approximate", recall=0.9)
    assert exact.search == "exact" and exact.recall == 1.0
    assert found.search == "approximate" and 0.85 < found.recall <= 1
    nodes, products = np.arange(6000, dtype=np.int32), Products(on_grid(vectors, "v"))
    cells = find_cells(products, nodes, 600_000, 0.9)
    pairs = {tuple(edge) for part in cell_edges(products, nodes, cells, 600_000) for edge in part.tolist()}
    real = edges_of(products, 600_000)
    assert pairs <= real and abs(len(pairs) / len(real) - cells.recall) < 0.04 and len(pairs) >= 0.87 * len(real)
    alike = all_pairs(products.grid)
    assert sorted(member for members, _ in found.groups for member in members) == list(range(6000))
    assert all(alike[np.ix_(members, members)].min() >= 600_000 for members, _ in found.groups)
    assert len(found.groups) < 1.1 * len(exact.groups)


@pytest.mark.parametrize("device", ["foo", "meta", 3.5])
def test_devices_that_torch_cannot_use_are_named(device):
    with pytest.raises(ValueError, match='find_groups: device must be "auto" or one that torch can use here'):
        find_groups(np.eye(3), list("abc"), device=device)


def test_vectors_may_be_tensors_lists_or_embeddings():
    vectors = clouds(40, 8, 5, 0.5)
    wanted = group(vectors, keys_of(vectors))
    tensor = torch.from_numpy(vectors).requires_grad_()
    for given in (tensor, vectors.tolist(), Embeddings(vectors, "hand", np.zeros(40, bool))):
        assert group(given, keys_of(vectors)) == wanted
    assert group(tensor.to(torch.bfloat16), keys_of(vectors)) == group(tensor.to(torch.bfloat16).float(), keys_of(vectors))
    for given in ([[1.0, 2.0], [3.0]], ["ab", "cd"], None):
        with pytest.raises(TypeError, match="group: embeddings must be"):
            group(given, ["a", "b"])


def test_many_near_equal_vectors_do_not_take_cubic_time():
    """All pairs tie: whenever a group is full, every row has lost its best."""
    rng, times = np.random.default_rng(0), []
    for count in (750, 3000):
        vectors = np.ones((count, 8)) + 1e-4 * rng.standard_normal((count, 8))
        edges = next(iter(exact_edges(Products(on_grid(vectors, "v"), tile=(count, count)), np.arange(count, dtype=np.int32), 500_000)))
        start = time.perf_counter()
        merges = core.complete_linkage(count, [edges], 2)
        times.append(time.perf_counter() - start)
        assert len(merges) == count // 2
    assert core.refusal is not None or times[1] < 40 * times[0] + 0.2  # 16 times the pairs, 64 times the triples


def test_a_core_of_other_sources_is_not_used(monkeypatch):
    monkeypatch.setattr(core, "INTERFACE", -1)
    assert core._load() == (None, "sage_kernels._grouping was built from other sources than these; build again") or core.refusal


def test_search_is_chosen_and_refused(monkeypatch):
    vectors, keys = np.eye(4), list("abcd")
    with pytest.raises(ValueError, match="find_groups: search must be one of 'auto', 'exact', 'approximate', got 'fast'"):
        find_groups(vectors, keys, search="fast")
    with pytest.raises(ValueError, match=r"find_groups: recall must be in \[0, 1\], got 1.5"):
        find_groups(vectors, keys, recall=1.5)
    monkeypatch.setattr(sage.grouping, "EXACT_MOST", {"cpu": 3})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"comparing all pairs of 4 prompts.*sage-diffusion\[grouping\]"):
        assert find_groups(vectors, keys, search="auto").search == "exact"
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ModuleNotFoundError, match=r'search="approximate" needs faiss.*sage-diffusion\[grouping\]'):
        find_groups(clouds(600, 8, 9, 0.5), [str(i) for i in range(600)], search="approximate")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_finds_the_same_edges_and_groups():
    vectors = clouds(9000, 384, 500, 0.75)
    grid, keys = on_grid(vectors, "v"), [f"{i:05}" for i in range(9000)]
    for least in (300_000, 600_000):
        assert edges_of(Products(grid, "cuda", tile=(4000, 3000)), least) == edges_of(Products(grid), least)
    assert find_groups(vectors, keys, device="cuda") == find_groups(vectors, keys, device="cpu")
