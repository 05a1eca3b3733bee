"""Checkpoints in safetensors and JSON: written whole or not at all, never a pickle.

    OUT/checkpoint-500/trainable.safetensors      weights that are trained, by their names in the denoiser
                       optimizer.safetensors      moments, NAME/exp_avg …
                       ema.safetensors            with --use_ema: the averaged weights
                       state.json                 step, place in the data, learning rate, settings

A checkpoint is written beside its place, flushed to disk, and moved there, so that a folder of that name is always complete. No random
state is in it: what is random in training depends on seed, epoch and group alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sage.output import to_json
from sage.prompts import InputError

__all__ = ["check_settings", "checkpoints", "load_optimizer", "load_weights", "optimizer_tensors", "read_state", "write_checkpoint"]

FORMAT = "sage-diffusion checkpoint 1"
NAME = re.compile(r"checkpoint-(\d+)")

Tensors = dict[str, torch.Tensor]


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, in the order of their steps."""
    if not folder.is_dir():
        return []
    found = [entry for entry in folder.iterdir() if NAME.fullmatch(entry.name) and (entry / "state.json").is_file()]
    return sorted(found, key=lambda entry: int(NAME.fullmatch(entry.name)[1]))


def write_checkpoint(
    folder: Path,
    step: int,
    files: dict[str, Tensors],
    state: dict[str, Any],
    limit: int | None = None,
    more: Callable[[Path], None] | None = None,
) -> Path:
    """Write a checkpoint, then remove the oldest ones beyond `limit`.

    Args:
        folder: the training's output folder, which exists.
        step: steps done.
        files: name (without ending) → tensors by name, on any device.
        state: plain data for state.json; the format and `step` are added.
        limit: most checkpoints to keep, this one among them; None: all.
        more: writes further files into the folder it is given, before the checkpoint counts.

    Returns:
        Its folder, `folder`/checkpoint-`step`; one that was there is replaced.
    """
    place = folder / f"checkpoint-{step}"
    partial = folder / f".{place.name}.part"
    _clear(folder)
    partial.mkdir()
    for name, tensors in files.items():
        whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        save_file(whole, partial / f"{name}.safetensors", {"format": "pt"})
    if more is not None:
        more(partial)
    (partial / "state.json").write_text(to_json({"format": FORMAT, "step": step, **state}, indent=1) + "\n", encoding="utf-8")
    for entry in [*(file for file in partial.rglob("*") if file.is_file()), partial]:
        _flush(entry)
    if place.exists():
        os.replace(place, folder / f".{place.name}.old")
    os.replace(partial, place)
    _flush(folder)
    _clear(folder)
    others = [other for other in checkpoints(folder) if other != place]
    for other in others[: max(0, len(others) + 1 - limit)] if limit is not None else ():
        shutil.rmtree(other)
    return place


def _clear(folder: Path) -> None:
    """Remove what a kill left in the middle of writing."""
    for entry in folder.glob(".checkpoint-*"):
        shutil.rmtree(entry, ignore_errors=True)


def _flush(path: Path) -> None:
    """Have a file's or a folder's content on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_state(place: Path) -> dict[str, Any]:
    """The state.json of a checkpoint. Raises InputError if it is none of this package."""
    try:
        state = json.loads((place / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{place}: state.json cannot be read ({error}); go on from another checkpoint.") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{place}: no checkpoint of this version of sage (its state.json does not say {FORMAT!r}).")
    return state


def check_settings(place: Path, state: dict[str, Any], settings: dict[str, Any]) -> None:
    """Refuse to go on with other settings than the checkpoint was made with. Raises InputError that names the differences."""
    old, new = state["settings"], json.loads(to_json(settings))
    changes = [f"{name} was {to_json(old.get(name))} and is {to_json(new.get(name))}" for name in sorted({*old, *new})
               if old.get(name) != new.get(name)]  # fmt: skip
    if changes:
        raise InputError(f"{place}: resuming wants the settings of the training that is there, but {'; '.join(changes)}.")


def load_tensors(place: Path, name: str) -> Tensors:
    """The tensors of one file of a checkpoint. Raises InputError if it is missing or damaged."""
    try:
        return load_file(place / f"{name}.safetensors")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{place}: {name}.safetensors cannot be read ({error}); go on from another checkpoint.") from None


@torch.no_grad()
def load_weights(place: Path, name: str, into: Tensors) -> None:
    """Copy the tensors of one file into others of the same names and shapes. Raises InputError if they differ."""
    tensors = load_tensors(place, name)
    odd = next((key for key in sorted({*tensors, *into}) if key not in tensors or key not in into or tensors[key].shape != into[key].shape),
               None)  # fmt: skip
    if odd is not None:
        has, wants = (list(of[odd].shape) if odd in of else "nothing" for of in (tensors, into))
        raise InputError(f"{place}: {name}.safetensors is of another model: for {odd} it holds {has}, wanted {wants}.")
    for key, value in into.items():
        value.copy_(tensors[key])


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> Tensors:
    """The optimizer's state as named tensors, PARAMETER/KEY.

    Args:
        optimizer: with one group of parameters.
        names: of its parameters, in their order.
    """
    states = optimizer.state_dict()["state"]
    return {f"{names[index]}/{key}": torch.as_tensor(value) for index, moments in states.items() for key, value in moments.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, names: Sequence[str], place: Path) -> None:
    """Put back what `optimizer_tensors` gave. Raises InputError for parameters of other names."""
    moments: dict[int, Tensors] = {}
    index_of = {name: index for index, name in enumerate(names)}
    for key, value in load_tensors(place, "optimizer").items():
        name, _, moment = key.rpartition("/")
        if name not in index_of:
            raise InputError(f"{place}: optimizer.safetensors is of another model: it holds {name}.")
        moments.setdefault(index_of[name], {})[moment] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
