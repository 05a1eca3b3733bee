"""Tell text encoders apart by what they hold, so that cached vectors are never another encoder's.

An identity is a sha256 over everything that decides the vectors up to rounding. It says nothing of devices or of
versions of torch. A folder is hashed as files, without loading it; the text encoder of a pipeline by its weights in
memory, as they may have been changed since they were read.
"""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["FORMAT", "Unidentified", "file_sha256", "files_identity", "files_stamp", "model_identity"]

FORMAT = 1  # raise it whenever the same encoder and prompt give other vectors: pooling, cutting, padding, normalising
READ_SUFFIXES = (".jinja", ".json", ".model", ".safetensors", ".txt")  # of what transformers reads in a folder
POOLING = "1_Pooling/config.json"
UNSTABLE_KEYS = ("_name_or_path", "transformers_version")  # of a configuration; they change without the vectors

_files: dict[tuple, str] = {}  # stamp of a folder, token limit → identity


class Unidentified(ValueError):
    """An encoder whose vectors must not be cached; the message says why."""


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file, read a block at a time. Raises OSError."""
    whole = hashlib.sha256()
    _hash_file(whole, path)
    return whole.hexdigest()


def _hash_file(whole: Any, path: Path) -> None:
    """Feed a file to a hash."""
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            whole.update(block)


def files_stamp(folder: Path) -> tuple:
    """Name, size in bytes and time of change in ns of every file that an encoder in `folder` is made of."""
    files = [file for file in folder.iterdir() if file.suffix in READ_SUFFIXES and file.is_file()]
    files += [file for file in [folder / POOLING] if file.is_file()]
    stats = [(str(file), file.stat()) for file in sorted(files)]
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def files_identity(folder: Path, most_tokens: int) -> str:
    """sha256 (hex) of the files in a folder; kept until they change.

    Args:
        folder: with a model and its tokenizer, as transformers saves them.
        most_tokens: tokens the encoder may read.
    Raises:
        Unidentified: the folder holds no safetensors weights.
    """
    stamp = files_stamp(folder)
    if not any(name.endswith(".safetensors") for name, _, _ in stamp):
        raise Unidentified(f"there are no safetensors weights in {folder}")
    if (stamp, most_tokens) not in _files:
        whole = hashlib.sha256(f"files {FORMAT} {most_tokens}\n".encode())
        for name, size, _ in stamp:
            whole.update(f"{Path(name).relative_to(folder).as_posix()} {size}\n".encode())
            _hash_file(whole, Path(name))
        _files[stamp, most_tokens] = whole.hexdigest()
    return _files[stamp, most_tokens]


def model_identity(model: Any, tokenizer: Any, limit: int, rank: int) -> str:
    """sha256 (hex) of a loaded encoder, made anew in every call: a row of a weight may have changed (about 2 s per GB).

    Args:
        model: a transformers model.
        tokenizer: its tokenizer.
        limit: tokens it reads.
        rank: how it is pooled.
    Raises:
        Unidentified: adapters change the model, whose strength is no weight, or weights are not plain numbers in memory.
    """
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise Unidentified(f"adapters are loaded into {type(model).__name__}")
    weights = model.state_dict()
    odd = next((name for name, weight in weights.items() if not _plain(weight)), None)
    if odd is not None:
        raise Unidentified(f"the weight {odd} of {type(model).__name__} is offloaded or quantized")
    config = {key: value for key, value in model.config.to_dict().items() if key not in UNSTABLE_KEYS}
    facts = ["model", FORMAT, limit, rank, type(model).__name__, config, _tokenizer_facts(tokenizer)]
    whole = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, weight in sorted(weights.items()):
        whole.update(f"\n{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        whole.update(_bytes(weight))
    return whole.hexdigest()


def _plain(weight: Any) -> bool:
    import torch

    return type(weight) in (torch.Tensor, torch.nn.Parameter) and not weight.is_meta and not weight.is_quantized


def _bytes(weight: Any) -> memoryview:
    import torch

    return memoryview(weight.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy())


def _tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    """Padding and truncation are left out: they are how it was last called."""
    facts = {"class": type(tokenizer).__name__, "special": str(tokenizer.special_tokens_map),
             "added": str(sorted(tokenizer.get_added_vocab().items()))}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        core = json.loads(backend.to_str())
        return facts | {"core": {key: value for key, value in core.items() if key not in ("padding", "truncation")}}
    with tempfile.TemporaryDirectory() as folder:  # written in Python, and known by its vocabulary files alone
        tokenizer.save_vocabulary(folder)
        return facts | {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in Path(folder).iterdir()}
