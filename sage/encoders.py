"""The text encoders that prompts are embedded with: finding and loading them, and telling two of them apart.

`find` says what an encoder is before it is loaded. Loading imports torch and transformers; an identity of a folder does
not, so prompts whose embeddings are all in the cache need neither.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sage.encoder_identity import files_identity, files_stamp, model_identity

__all__ = ["Encoder", "FileSource", "PipelineSource", "find"]

SHIPPED = "sage.emoji text encoder"  # the name of "auto" in records
SHIPPED_TOKENS = 64  # the shipped encoder has positions for these; its tokenizer's own limit is the diffusion model's
MOST_TOKENS = 256  # of any other encoder that could read more
MEAN_POOLED = ("bert", "distilbert", "mt5", "roberta", "t5", "umt5", "xlm-roberta")  # in pipelines; CLIP pools itself


@dataclass(frozen=True)
class Encoder:
    """A loaded text encoder.

    Args:
        name: for records.
        tokenizer: a transformers tokenizer.
        limit: tokens it reads, special ones included.
        device: where it runs.
        pooled: (input_ids, attention_mask), both int64 [n, length] → [n, d], any floating dtype.
    """

    name: str
    tokenizer: Any
    limit: int
    device: Any
    pooled: Callable[[Any, Any], Any]


@dataclass(frozen=True)
class FileSource:
    """An encoder in a folder or on the hub.

    Args:
        name: for records.
        source: folder or hub id.
        local: whether it is a folder.
        most_tokens: tokens it may read, if it could read more.
        device: where it shall run.
    """

    name: str
    source: str
    local: bool
    most_tokens: int
    device: str

    def load(self) -> Encoder:
        """The encoder; kept, and loaded anew when the files of its folder change.

        Raises:
            RuntimeError: it cannot be loaded.
            NotImplementedError: it reads more than text, or pools in an unknown way.
        """
        stamp = files_stamp(Path(self.source)) if self.local else ()
        return _load(self.name, self.source, self.local, self.most_tokens, self.device, stamp)

    def identity(self) -> str:
        """sha256, as hex digits, of all that decides its vectors up to rounding; a folder is not loaded for it.

        Raises:
            Unidentified: its weights are not in files that can be hashed.
        """
        if self.local:
            return files_identity(Path(self.source), self.most_tokens)
        self.load()  # has the files of this revision brought here
        from transformers.utils import cached_file

        return files_identity(Path(cached_file(self.source, "config.json", local_files_only=True)).parent, self.most_tokens)


@dataclass(frozen=True)
class PipelineSource:
    """The pooled text encoder of a pipeline: the CLIP with a projection, else CLIP, else the mean of BERT or T5.

    Args:
        place: its attribute of the pipeline.
        model, tokenizer: as they are in the pipeline.
        rank: 0: projected, 1: pooled by itself, 2: mean of the tokens.
        device: where the pipeline runs.
    """

    place: str
    model: Any
    tokenizer: Any
    rank: int
    device: Any

    @property
    def name(self) -> str:
        return f"pipeline {self.place} ({type(self.model).__name__})"

    def load(self) -> Encoder:
        """The encoder, which is loaded already."""

        def pooled(ids, mask):
            if self.rank == 2:
                return _masked_mean(self.model(input_ids=ids, attention_mask=mask).last_hidden_state, mask)
            output = self.model(input_ids=ids)  # as diffusers calls CLIP: causal, so padding behind the end is not seen
            return output.text_embeds if self.rank == 0 else output.pooler_output

        return Encoder(self.name, self.tokenizer, _limit(self.model, MOST_TOKENS), self.device, pooled)

    def identity(self) -> str:
        """sha256, as hex digits, of its weights, configuration and vocabulary as they are now.

        Raises:
            Unidentified: the weights are on no device, quantized, or changed by adapters.
        """
        return model_identity(self.model, self.tokenizer, _limit(self.model, MOST_TOKENS), self.rank)


def find(encoder: str, pipe: Any, device: Any) -> FileSource | PipelineSource:
    """The encoder that `embed_prompts` was asked for; nothing is loaded yet.

    Raises:
        TypeError: encoder is no text.
        ValueError: "pipeline" without a pipeline.
        FileNotFoundError: there is no such folder.
        NotImplementedError: the pipeline has no text encoder that pools.
    """
    if not isinstance(encoder, str) or not encoder:
        raise TypeError(f'embed_prompts: encoder must be "auto", "pipeline", a folder or a hub id, got {encoder!r}')
    if encoder == "pipeline":
        if pipe is None:
            raise ValueError('embed_prompts: encoder="pipeline" needs the pipeline; pass pipe=')
        return _from_pipeline(pipe)
    if encoder == "auto":
        from sage.emoji import text_encoder_path

        return FileSource(SHIPPED, str(text_encoder_path()), True, SHIPPED_TOKENS, str(device))
    folder = Path(encoder).expanduser()
    if folder.is_dir():
        return FileSource(encoder, str(folder.resolve()), True, MOST_TOKENS, str(device))
    if encoder[0] in "./~" or "\\" in encoder or encoder.count("/") > 1:
        raise FileNotFoundError(f"embed_prompts: encoder folder {encoder!r} does not exist")
    return FileSource(encoder, encoder, False, MOST_TOKENS, str(device))


@functools.lru_cache(maxsize=2)
def _load(name: str, source: str, local: bool, most_tokens: int, device: str, stamp: tuple) -> Encoder:
    """A transformers or sentence-transformers model; kept, as every call of a pipeline may ask for it.

    Args: stamp: of its files; another one has it loaded anew.
    """
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
    _refuse_modules(name, source, local)
    model = model.to(device, torch.float32).eval().requires_grad_(False)
    pool = _first_token if _pools_first_token(name, source, local) else _masked_mean

    def pooled(ids, mask):
        return pool(model(input_ids=ids, attention_mask=mask).last_hidden_state, mask)

    return Encoder(name, tokenizer, _limit(model, most_tokens), device, pooled)


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


def _from_pipeline(pipe: Any) -> PipelineSource:
    found = []
    for suffix in ("_2", "", "_3"):
        model, tokenizer = getattr(pipe, f"text_encoder{suffix}", None), getattr(pipe, f"tokenizer{suffix}", None)
        kind = getattr(getattr(model, "config", None), "model_type", None)
        if tokenizer is not None and (kind == "clip_text_model" or kind in MEAN_POOLED):
            rank = 2 if kind in MEAN_POOLED else int(not hasattr(model, "text_projection"))
            device = getattr(pipe, "_execution_device", None) or model.device  # with offloading, not where the weights lie
            found.append(PipelineSource(f"text_encoder{suffix}", model, tokenizer, rank, device))
    if not found:
        raise NotImplementedError(f"embed_prompts: {type(pipe).__name__} has no text encoder that pools (CLIP, "
                                  f'{", ".join(MEAN_POOLED)}); use encoder="auto" or name a sentence encoder')
    return min(found, key=lambda source: source.rank)


def _limit(model: Any, most_tokens: int) -> int:
    """Tokens a model reads; the tokenizer's own limit may serve another purpose and is not asked."""
    positions = getattr(model.config, "max_position_embeddings", None) or most_tokens
    if "roberta" in model.config.model_type or model.config.model_type == "mpnet":
        positions -= 2  # they count positions from the padding id on
    return min(most_tokens, positions)


def _refuse_modules(name: str, source: str, local: bool) -> None:
    """Refuse a sentence-transformers model with parts beside the transformer, its pooling and normalisation, such as a dense layer."""
    from transformers.utils import cached_file

    try:
        path = cached_file(source, "modules.json", local_files_only=local)
    except OSError:  # a plain transformers model
        return
    kinds = [str(module.get("type", "")).rsplit(".", 1)[-1] for module in json.loads(Path(path).read_text(encoding="utf-8"))]
    odd = sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"})
    if odd:
        raise NotImplementedError(f"embed_prompts: encoder {name!r} has parts that are not read here ({', '.join(odd)}); embed with "
                                  "sentence-transformers and bring the vectors (sage.load_embeddings)")


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
