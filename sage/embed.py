"""Prompts → embeddings that say which prompts are alike.

    embeddings = embed_prompts(prompts)                       # the sentence encoder that comes with the package
    embeddings = embed_prompts(prompts, "pipeline", pipe)     # the pipeline's own pooled text encoder
    embeddings = embed_prompts(prompts, "sentence-transformers/all-MiniLM-L6-v2")     # or a folder
    embeddings = embed_prompts(prompts, cache=True)           # prompts that were embedded before are read from disk

Cosine similarities are not comparable between encoders: CLIP's are above 0.5 for prompts that have nothing in common,
so `similarity=0.6` means something for sentence encoders only.

Every distinct prompt is embedded once, in batches made from the sorted set of prompts, padded to a multiple of eight
tokens. So vectors depend on the set of prompts alone, never on their order or repetition; prompts that come or go move
the others by rounding at most. With a cache, a vector is that of the run that first saw the prompt, to the bit.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sage.embed_cache import open_store
from sage.encoders import Encoder, find
from sage.plan_checks import integer, texts

__all__ = ["Embeddings", "distinct_vectors", "embed_prompts", "read_flags"]

BUCKET = 8  # batches are padded to a multiple of this


@dataclass(frozen=True, eq=False)
class Embeddings:
    """What `embed_prompts` returns.

    Args:
        vectors: float32 [n, d], rows of length 1.
        encoder: name of the encoder, for the record.
        unknown: bool [n]; prompts of which the encoder knows less than half. They look alike to it, whatever they
            say, and must not be grouped.
    """

    vectors: np.ndarray
    encoder: str
    unknown: np.ndarray

    def __len__(self) -> int:
        return len(self.vectors)


def embed_prompts(
    prompts: Sequence[str],
    encoder: str = "auto",
    pipe: Any = None,
    batch_size: int = 64,
    progress: bool = False,
    *,
    device: Any = "cpu",
    cache: str | Path | bool | None = None,
) -> Embeddings:
    """Embed prompts for grouping.

    Args:
        prompts: n texts, at least one; equal ones get equal rows.
        encoder: "auto": the sentence encoder that comes with the package. "pipeline": the pooled text encoder of
            `pipe`. Else a folder or hub id of a transformers or sentence-transformers model, mean-pooled unless it
            says otherwise; only safetensors are read, no code is run, and nothing is downloaded for a folder.
        pipe: a diffusers pipeline; needed for "pipeline".
        batch_size: prompts at once.
        progress: show a bar.
        device: where to run. "pipeline" runs where the pipeline does.
        cache: a folder in which vectors are kept and looked up, True for the usual one (`sage.embed_cache`), None or
            False for neither. Only prompts that are not in it are embedded; an encoder in a folder is not even
            loaded when there are none. What is kept are vectors and digests, not the prompts.

    Returns:
        Embeddings, rows in the order of the prompts. Warns, with a count, about prompts that had to be cut and
        about prompts that the encoder mostly does not know, and about a cache that is damaged or cannot be used.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.
        FileNotFoundError: there is no such folder.
        NotImplementedError: the encoder does not read text alone, or pools in an unknown way.
        RuntimeError: the encoder cannot be loaded, or gives no usable vector for a prompt.
    """
    prompts = texts(prompts, "embed_prompts: prompts")
    batch_size = integer(batch_size, "embed_prompts: batch_size", 1)
    source = find(encoder, pipe, device)
    distinct = sorted(set(prompts))
    row_of = {prompt: row for row, prompt in enumerate(distinct)}
    rows = [row_of[prompt] for prompt in prompts]
    store = open_store(cache, source)
    stored = store.read(distinct) if store is not None else {}
    unknown = np.array([prompt in stored and stored[prompt].unknown for prompt in distinct])
    cut = np.array([prompt in stored and stored[prompt].cut for prompt in distinct])
    missing = [row for row, prompt in enumerate(distinct) if prompt not in stored]
    loaded = source.load() if missing else None
    limit = loaded.limit if missing else store.limit
    new = [distinct[row] for row in missing]
    if missing:
        unknown[missing], cut[missing] = read_flags(loaded, new)
    _warn(cut[rows], prompts, f"are longer than the {limit} tokens that {source.name} reads, and were cut")
    _warn(unknown[rows], prompts, f"are mostly unknown to {source.name} and will not be grouped; another encoder may know them")
    if not missing:
        return Embeddings(np.stack([stored[prompt].vector for prompt in prompts]), source.name, unknown[rows])
    fresh = distinct_vectors(loaded, new, batch_size, progress)
    if any(len(entry.vector) != fresh.shape[1] for entry in stored.values()):
        removed = store.discard(f"holds vectors of another length than the {fresh.shape[1]} numbers of {source.name}")
        return embed_prompts(prompts, encoder, pipe, batch_size, progress, device=device, cache=cache if removed else None)
    if store is not None:
        store.write(new, fresh, unknown[missing], cut[missing], limit)
    vectors = np.empty((len(distinct), fresh.shape[1]), dtype=np.float32)
    vectors[missing] = fresh
    for prompt, entry in stored.items():
        vectors[row_of[prompt]] = entry.vector
    return Embeddings(vectors[rows], source.name, unknown[rows])


def _warn(hit: np.ndarray, prompts: list[str], what: str) -> None:
    if hit.any():
        example = prompts[int(hit.argmax())]
        warnings.warn(f"embed_prompts: {hit.sum()} of {len(prompts)} prompts {what} (the first: {example!r:.80})",
                      stacklevel=3)


def read_flags(encoder: Encoder, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Which prompts an encoder mostly does not know, and which are longer than it reads: bool [n], bool [n]."""
    words = encoder.tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"]
    room = encoder.limit - encoder.tokenizer.num_special_tokens_to_add()
    unknown = np.array([_mostly_unknown(ids, encoder.tokenizer.unk_token_id) for ids in words])
    return unknown, np.array([len(ids) > room for ids in words])


def _mostly_unknown(ids: list[int], unknown_id: int | None) -> bool:
    """Whether at least half of a prompt's tokens are unknown, or there are none."""
    return 2 * sum(token == unknown_id for token in ids) >= len(ids)


def distinct_vectors(encoder: Encoder, prompts: list[str], batch_size: int, progress: bool) -> np.ndarray:
    """float32 [n, d], rows of length 1, for distinct prompts in canonical order."""
    import torch

    tokens = encoder.tokenizer(prompts, truncation=True, max_length=encoder.limit, verbose=False)["input_ids"]
    widths = [min(math.ceil(max(len(ids), 1) / BUCKET) * BUCKET, encoder.limit) for ids in tokens]
    batches = []
    for width in sorted(set(widths)):
        rows = [row for row in range(len(prompts)) if widths[row] == width]
        batches += [(width, rows[first : first + batch_size]) for first in range(0, len(rows), batch_size)]
    if progress:
        from tqdm.auto import tqdm

        batches = tqdm(batches, desc="embedding prompts", unit="batch")
    vectors = None
    for width, rows in batches:
        ids = np.full((len(rows), width), encoder.tokenizer.pad_token_id or 0, dtype=np.int64)
        mask = np.zeros_like(ids)
        for line, row in enumerate(rows):
            ids[line, : len(tokens[row])] = tokens[row]
            mask[line, : len(tokens[row])] = 1
        with torch.inference_mode():
            pooled = encoder.pooled(torch.from_numpy(ids).to(encoder.device), torch.from_numpy(mask).to(encoder.device))
        pooled = pooled.to("cpu", torch.float64).numpy()
        if vectors is None:
            vectors = np.empty((len(prompts), pooled.shape[1]))
        vectors[rows] = pooled
    vectors[[row for row, ids in enumerate(tokens) if not ids]] = 1.0  # nothing to read: unknown, any direction will do
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    usable = np.isfinite(lengths) & (lengths > 0)
    if not usable.all():
        bad = int((~usable).argmax())
        raise RuntimeError(f"embed_prompts: {encoder.name} gave no usable embedding for {prompts[bad]!r:.80}; its "
                           "weights or its precision may be at fault")
    return (vectors / lengths).astype(np.float32)


