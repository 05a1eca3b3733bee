"""What a network is, by its weights: pictures and features of one must not be taken for another's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["modules_identity", "pipeline_identity"]


def modules_identity(modules: Mapping[str, torch.nn.Module]) -> str:
    """sha256 (hex) over every weight and buffer of some modules, by name, dtype and bytes; about 2 s per GB.

    It is the same on every device. A weight that is nowhere in memory (offloaded to disk) counts by its shape alone.
    """
    whole = hashlib.sha256()
    for place, module in sorted(modules.items()):
        whole.update(f"\n\n{place} {type(module).__name__}".encode())
        for name, weight in sorted(module.state_dict().items()):
            whole.update(f"\n{name} ".encode())
            _hash_weight(whole, weight)
    return whole.hexdigest()


def _hash_weight(whole: Any, weight: Any) -> None:
    if not torch.is_tensor(weight):  # a module's extra state
        whole.update(repr(weight).encode())
        return
    whole.update(f"{weight.dtype} {tuple(weight.shape)}\n".encode())
    if not weight.is_meta:
        plain = weight.detach()
        plain = plain.dequantize() if plain.is_quantized or type(plain) is not torch.Tensor else plain
        whole.update(memoryview(plain.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))


def pipeline_identity(pipe: Any) -> str:
    """sha256 (hex) of what draws: all networks of a pipeline and the scheduler with its configuration."""
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    scheduler = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}  # those tell files and versions
    facts = [type(pipe).__name__, modules_identity(modules), type(pipe.scheduler).__name__, scheduler]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
