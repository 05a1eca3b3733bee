"""Prompts → embeddings that say which prompts are alike.

    embeddings = embed_prompts(prompts)                       # the sentence encoder that comes with the package
    embeddings = embed_prompts(prompts, "pipeline", pipe)     # the pipeline's own pooled text encoder
    embeddings = embed_prompts(prompts, "sentence-transformers/all-MiniLM-L6-v2")     # or a folder

Cosine similarities are not comparable between encoders: CLIP's are above 0.5 for prompts that have nothing in common,
so `similarity=0.6` means something for sentence encoders only.

Every distinct prompt is embedded once, in batches made from the sorted set of prompts, padded to a multiple of eight
tokens. So vectors depend on the set of prompts alone, never on their order or repetition; prompts that come or go move
the others by rounding at most.
"""

import contextlib
import functools
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sage.plan_checks import integer, texts

__all__ = ["Embeddings", "embed_prompts"]

SHIPPED = "sage.emoji text encoder"  # the name of "auto" in records
SHIPPED_TOKENS = 64  # the shipped encoder has positions for these; its tokenizer's own limit is the diffusion model's
MOST_TOKENS = 256  # of any other encoder that could read more
BUCKET = 8  # batches are padded to a multiple of this
MEAN_POOLED = ("bert", "distilbert", "mt5", "roberta", "t5", "umt5", "xlm-roberta")  # in pipelines; CLIP pools itself


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


@dataclass(frozen=True)
class _Encoder:
    name: str
    tokenizer: Any
    limit: int  # tokens, special ones included
    device: Any
    pooled: Callable[[Any, Any], Any]  # input_ids, attention_mask, both int64 [n, length] → [n, d]


def embed_prompts(
    prompts: Sequence[str],
    encoder: str = "auto",
    pipe: Any = None,
    batch_size: int = 64,
    progress: bool = False,
    *,
    device: Any = "cpu",
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

    Returns:
        Embeddings, rows in the order of the prompts. Warns, with a count, about prompts that had to be cut and
        about prompts that the encoder mostly does not know.
    """
    prompts = texts(prompts, "embed_prompts: prompts")
    batch_size = integer(batch_size, "embed_prompts: batch_size", 1)
    found = _find(encoder, pipe, device)
    distinct = sorted(set(prompts))
    row_of = {prompt: row for row, prompt in enumerate(distinct)}
    rows = [row_of[prompt] for prompt in prompts]
    words = found.tokenizer(distinct, add_special_tokens=False, verbose=False)["input_ids"]
    unknown = np.array([_mostly_unknown(ids, found.tokenizer.unk_token_id) for ids in words])[rows]
    room = found.limit - found.tokenizer.num_special_tokens_to_add()
    cut = np.array([len(ids) > room for ids in words])[rows]
    _warn(cut, prompts, f"are longer than the {found.limit} tokens that {found.name} reads, and were cut")
    _warn(unknown, prompts, f"are mostly unknown to {found.name} and will not be grouped; another encoder may know them")
    return Embeddings(_vectors(found, distinct, batch_size, progress)[rows], found.name, unknown)


def _warn(hit: np.ndarray, prompts: list[str], what: str) -> None:
    if hit.any():
        example = prompts[int(hit.argmax())]
        warnings.warn(f"embed_prompts: {hit.sum()} of {len(prompts)} prompts {what} (the first: {example!r:.80})",
                      stacklevel=3)


def _mostly_unknown(ids: list[int], unknown_id: int | None) -> bool:
    """Whether at least half of a prompt's tokens are unknown, or there are none."""
    return 2 * sum(token == unknown_id for token in ids) >= len(ids)


def _vectors(encoder: _Encoder, prompts: list[str], batch_size: int, progress: bool) -> np.ndarray:
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


def _find(encoder: str, pipe: Any, device: Any) -> _Encoder:
    if not isinstance(encoder, str) or not encoder:
        raise TypeError(f'embed_prompts: encoder must be "auto", "pipeline", a folder or a hub id, got {encoder!r}')
    if encoder == "pipeline":
        if pipe is None:
            raise ValueError('embed_prompts: encoder="pipeline" needs the pipeline; pass pipe=')
        return _from_pipeline(pipe)
    if encoder == "auto":
        from sage.emoji import text_encoder_path

        return _load(SHIPPED, str(text_encoder_path()), True, SHIPPED_TOKENS, str(device))
    folder = Path(encoder).expanduser()
    if folder.is_dir():
        return _load(encoder, str(folder.resolve()), True, MOST_TOKENS, str(device))
    if encoder[0] in "./~" or "\\" in encoder or encoder.count("/") > 1:
        raise FileNotFoundError(f"embed_prompts: encoder folder {encoder!r} does not exist")
    return _load(encoder, encoder, False, MOST_TOKENS, str(device))


@functools.lru_cache(maxsize=2)
def _load(name: str, source: str, local: bool, most_tokens: int, device: str) -> _Encoder:
    """A transformers or sentence-transformers model; kept, as every call of a pipeline may ask for it."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    kind = {"trust_remote_code": False, "local_files_only": local}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **kind)
        # Fresh weights of unused heads must not move the caller's random numbers.
        with torch.random.fork_rng(devices=[]), _without_loading_bar():
            model = AutoModel.from_pretrained(source, use_safetensors=True, **kind)
    except (OSError, ValueError) as error:
        raise RuntimeError(f"embed_prompts: cannot load encoder {name!r} (wanted a tokenizer and a model with safetensors "
                           f"weights, in a folder or on the hub): {error}") from error
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    if hasattr(model.config, "text_config"):
        raise NotImplementedError(f"embed_prompts: encoder {name!r} is a {type(model).__name__}, which does not read "
                                  "text alone; name a sentence encoder")
    model = model.to(device, torch.float32).eval().requires_grad_(False)
    pool = _first_token if _pools_first_token(name, source, local) else _masked_mean

    def pooled(ids, mask):
        return pool(model(input_ids=ids, attention_mask=mask).last_hidden_state, mask)

    return _Encoder(name, tokenizer, _limit(model, most_tokens), device, pooled)


@contextlib.contextmanager
def _without_loading_bar() -> Iterator[None]:
    """Weights of a small encoder load at once; a bar for it would only come between the caller's own lines."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _from_pipeline(pipe: Any) -> _Encoder:
    """The pooled text encoder of a pipeline: the CLIP with a projection, else CLIP, else the mean of BERT or T5."""
    found = []
    for suffix in ("_2", "", "_3"):
        model, tokenizer = getattr(pipe, f"text_encoder{suffix}", None), getattr(pipe, f"tokenizer{suffix}", None)
        kind = getattr(getattr(model, "config", None), "model_type", None)
        if tokenizer is not None and (kind == "clip_text_model" or kind in MEAN_POOLED):
            rank = 2 if kind in MEAN_POOLED else int(not hasattr(model, "text_projection"))
            found.append((rank, f"text_encoder{suffix}", model, tokenizer))
    if not found:
        raise NotImplementedError(f"embed_prompts: {type(pipe).__name__} has no text encoder that pools (CLIP, "
                                  f'{", ".join(MEAN_POOLED)}); use encoder="auto" or name a sentence encoder')
    rank, place, model, tokenizer = min(found, key=lambda item: item[0])

    def pooled(ids, mask):
        if rank == 2:
            return _masked_mean(model(input_ids=ids, attention_mask=mask).last_hidden_state, mask)
        output = model(input_ids=ids)  # as diffusers calls CLIP: causal, so padding behind the end is not seen
        return output.text_embeds if rank == 0 else output.pooler_output

    device = getattr(pipe, "_execution_device", None) or model.device  # with offloading, not where the weights lie
    return _Encoder(f"pipeline {place} ({type(model).__name__})", tokenizer, _limit(model, MOST_TOKENS), device, pooled)


def _limit(model: Any, most_tokens: int) -> int:
    """Tokens a model reads; the tokenizer's own limit may serve another purpose and is not asked."""
    positions = getattr(model.config, "max_position_embeddings", None) or most_tokens
    if "roberta" in model.config.model_type or model.config.model_type == "mpnet":
        positions -= 2  # they count positions from the padding id on
    return min(most_tokens, positions)


def _pools_first_token(name: str, source: str, local: bool) -> bool:
    """Whether a sentence-transformers model says that it pools its first token; any other way than mean is refused."""
    from transformers.utils import cached_file

    try:
        path = cached_file(source, "1_Pooling/config.json", local_files_only=local)
    except OSError:  # a plain transformers model
        return False
    config = json.loads(Path(path).read_text(encoding="utf-8"))
    modes = {key.removeprefix("pooling_mode_").removesuffix("_token").removesuffix("_tokens")
             for key, value in config.items() if key.startswith("pooling_mode_") and value is True}
    modes |= {config["pooling_mode"]} if isinstance(config.get("pooling_mode"), str) else set()
    if modes not in ({"mean"}, {"cls"}):
        raise NotImplementedError(f"embed_prompts: encoder {name!r} pools by {sorted(modes)}; known: mean, cls")
    return modes == {"cls"}


def _masked_mean(hidden: Any, mask: Any) -> Any:
    """[n, length, d], [n, length] → [n, d], summed in float32."""
    weights = mask[..., None].float()
    return (hidden.float() * weights).sum(1) / weights.sum(1).clamp(min=1)


def _first_token(hidden: Any, mask: Any) -> Any:
    return hidden[:, 0]
