"""Load the pipeline that `--model` names; safetensors weights only, and never code from a model's folder."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

from sage.prompts import InputError, count

PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".msgpack")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
EMBEDDED = "embedded emoji model"


def check_model(model: str | None) -> None:
    """Refuse what cannot be a diffusers model, before anything is loaded.

    Args:
        model: a folder in diffusers' layout, a hub id, or None for the model that comes with the package.
    Raises:
        InputError: saying what was found instead, and what to do.
    """
    if model is None:
        return
    folder = Path(model).expanduser()
    if folder.is_dir():
        _check_folder(folder, model)
    elif folder.exists():
        raise InputError(
            f"--model {model}: this is a single file; give a folder in diffusers' layout (with model_index.json). "
            "StableDiffusionPipeline.from_single_file(...).save_pretrained(FOLDER) makes one of a .safetensors file."
        )
    elif not HUB_ID.fullmatch(model):
        raise InputError(f"--model {model}: no such folder.")


def load_model(model: str | None, device: str | None = None, dtype: str | None = None):
    """Load a text-to-image pipeline.

    Args:
        model: as for `check_model`.
        device: "cpu", "cuda", "cuda:1" …; None: a GPU when there is one.
        dtype: float32, float16 or bfloat16; None: float16 on a GPU, float32 elsewhere.
    Returns:
        The pipeline, on its device.
    Raises:
        InputError: the model cannot be loaded as it is. RuntimeError: the device is not there.
    """
    import torch
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    device = check_device(device)
    dtype = getattr(torch, dtype or ("float16" if device.type == "cuda" else "float32"))
    if model is None:
        from sage.emoji import load_pipeline

        pipe = load_pipeline()
    else:
        pipe = _from_pretrained(model, dtype)
        if "prompt" not in inspect.signature(type(pipe).__call__).parameters:
            raise InputError(f"--model {model}: a {type(pipe).__name__} takes no prompt; give a text-to-image model.")
    return pipe.to(device, dtype)


def check_device(device: str | None):
    """The torch.device to run on; a GPU when there is one and nothing else was asked for.

    Raises:
        InputError: unknown to torch, or not in this machine.
    """
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        wanted = torch.device(device)
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"--device {device}: cannot be used here ({reason}).") from None
    if wanted.type == "meta":
        raise InputError("--device meta: holds no numbers, so nothing can be drawn on it.")
    return wanted


def _check_folder(folder: Path, model: str) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        found = sorted(entry.name for entry in folder.iterdir())
        held = f"it holds {', '.join(found[:5])}{' …' if len(found) > 5 else ''}" if found else "it is empty"
        raise InputError(f"--model {model}: not a diffusers model folder: no model_index.json in it ({held}).")
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"--model {model}: model_index.json is not valid JSON ({error}).") from None
    if not isinstance(parts, dict) or not isinstance(parts.get("_class_name"), str):
        raise InputError(f"--model {model}: model_index.json names no pipeline class of diffusers.")
    pickled = [name for name in parts if (folder / name).is_dir() and _only_pickled(folder / name)]
    if pickled:
        raise InputError(
            f"--model {model}: the weights of {', '.join(pickled)} are pickle files only, which can run code when loaded; "
            "sage reads safetensors. pipe.save_pretrained(FOLDER, safe_serialization=True) converts a model you trust."
        )


def _only_pickled(part: Path) -> bool:
    endings = {file.suffix.lower() for file in part.iterdir() if file.is_file()}
    return ".safetensors" not in endings and bool(endings & set(PICKLED))


def _from_pretrained(model: str, dtype):
    from diffusers import DiffusionPipeline

    folder = Path(model).expanduser()
    source = str(folder) if folder.is_dir() else model
    try:
        return DiffusionPipeline.from_pretrained(source, torch_dtype=dtype, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())
        if "safetensors" in reason:
            reason = f"it has no safetensors weights, and pickle files are not read ({reason})"
        raise InputError(f"--model {model}: cannot be loaded: {reason[:600]}") from error


def cut_prompts(pipe, prompts) -> str | None:
    """A sentence that counts the prompts the text encoder will cut, None when it reads them all."""
    tokenizer = getattr(pipe, "tokenizer", None)
    limit = getattr(tokenizer, "model_max_length", None)
    if tokenizer is None or not isinstance(limit, int) or limit > 100_000:  # an absurd number means: no limit known
        return None
    lengths = [len(ids) for ids in tokenizer(list(prompts), truncation=False, verbose=False)["input_ids"]]
    longer = [prompt for prompt, length in zip(prompts, lengths) if length > limit]
    if not longer:
        return None
    return (
        f"{count(len(longer), 'prompt')} of {len(lengths)} longer than the {limit} tokens that the text encoder reads; "
        f"the rest of {'it is' if len(longer) == 1 else 'them is'} not seen (the first: {longer[0][:60]!r})."
    )
