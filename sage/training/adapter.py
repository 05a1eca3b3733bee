"""The LoRA that is trained: put into the denoiser, switched off for a moment, and saved as one that diffusers loads."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save

from sage.adapters import FILE, LORA_CONFIG, SETTINGS, AdapterSettings
from sage.output import write_atomic
from sage.training.data import draw
from sage.training.families import Family

__all__ = ["adapter_off", "attach_adapter", "save_adapter", "trainable"]


def attach_adapter(denoiser: torch.nn.Module, targets: Sequence[str], rank: int, alpha: float | None = None, seed: int = 0) -> None:
    """Freeze a denoiser and put a LoRA into it that changes nothing yet. Its own weights are all that is trainable then.

    Args:
        denoiser: without an adapter.
        targets: see `Family.lora_targets`.
        rank, alpha: of the LoRA, which is scaled by alpha / rank; alpha None: the rank.
        seed: of its first weights; nothing else's random state is touched.
    """
    denoiser.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, init_lora_weights="gaussian", target_modules=list(targets))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw("lora", seed))
        if hasattr(denoiser, "add_adapter"):
            denoiser.add_adapter(config)
        else:
            inject_adapter_in_model(config, denoiser)


def trainable(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


@contextlib.contextmanager
def adapter_off(denoiser: torch.nn.Module) -> Iterator[None]:
    """The base model while inside. Do not enter it between a forward pass and its backward pass."""
    layers = [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def save_adapter(family: Family, folder: Path, settings: AdapterSettings, state_dict: dict[str, torch.Tensor] | None = None) -> Path:
    """Write the LoRA of a family's denoiser to `folder`/pytorch_lora_weights.safetensors, whole or not at all.

    Args:
        family: with the adapter of `attach_adapter`.
        folder: made if it is not there.
        settings: what it was trained for, for the file's metadata.
        state_dict: of the denoiser, gathered from several processes; None: the denoiser's own.

    Returns:
        The file.
    """
    denoiser, name = family.denoiser, family.denoiser_name
    config = denoiser.peft_config["default"]
    described = {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": sorted(config.target_modules)}
    metadata = {
        "format": "pt",
        LORA_CONFIG: json.dumps({f"{name}.{key}": value for key, value in described.items()}, sort_keys=True),
        SETTINGS: settings.to_json(),
    }

    def write(weights: dict[str, torch.Tensor], filename: Any) -> None:
        write_atomic(Path(filename), save({key: value.detach().cpu().contiguous() for key, value in weights.items()}, metadata))

    layers = get_peft_model_state_dict(denoiser, state_dict)
    folder.mkdir(parents=True, exist_ok=True)
    if not hasattr(family.pipe, "save_lora_weights"):
        write({f"{name}.{key}": value for key, value in layers.items()}, folder / FILE)
    else:
        layers = convert_state_dict_to_diffusers(layers) if name == "unet" else layers
        family.pipe.save_lora_weights(folder, **{f"{name}_lora_layers": layers}, weight_name=FILE, save_function=write)
    return folder / FILE
