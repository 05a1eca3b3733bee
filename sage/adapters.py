"""LoRAs that were trained for sharing, loaded together with what they were trained for.

    sage.load_adapter(pipe, "out")                  # the folder of a `sage train`, or a .safetensors file
    with sage.enable(pipe):                         # shares as much as the adapter was trained for; share=... overrides
        images = pipe(prompts).images

The file is an ordinary LoRA of diffusers: `pipe.load_lora_weights("out")` loads it too, but leaves the pipeline without the settings,
so that sharing begins from its own defaults.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from sage.prompts import InputError

__all__ = ["AdapterSettings", "adapter_file", "load_adapter", "read_adapter_settings", "unload_adapter", "usual_share"]

FILE = "pytorch_lora_weights.safetensors"
SETTINGS, LORA_CONFIG = "sage", "lora_adapter_metadata"  # keys of the file's metadata; the second is diffusers' own
SHARE = 0.4  # of pipelines without an adapter


@dataclass(frozen=True)
class AdapterSettings:
    """What an adapter was trained for.

    Attributes:
        share: β, the fraction of the calls that groups shared; None: trained without sharing.
        num_inference_steps: of the schedule that it was taken from.
        soft_target: of the trunk, see `sage.training.targets.trunk_batch`.
        similarity: least cosine inside the groups.
        model: of what model, by the name that training was given.
    """

    share: float | None
    num_inference_steps: int | None = None
    soft_target: str | None = None
    similarity: float | None = None
    model: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def adapter_file(path: str | Path) -> Path:
    """The file of a LoRA, given it or its folder. Raises InputError if there is none."""
    place = Path(path).expanduser()
    if place.is_dir():
        if not (place / FILE).is_file():
            raise InputError(f"{path}: no {FILE} in this folder; name the adapter's .safetensors file, or the folder of a `sage train`.")
        return place / FILE
    if not place.is_file():
        raise InputError(f"{path}: no such file or folder.")
    if place.suffix != ".safetensors":
        raise InputError(f"{path}: wanted a .safetensors file, got {place.suffix or 'no ending'}; other kinds are not read.")
    return place


def read_adapter_settings(path: str | Path) -> AdapterSettings | None:
    """What an adapter was trained for; None if its file does not say. Raises InputError if it cannot be read."""
    text = _metadata(adapter_file(path)).get(SETTINGS)
    try:
        values = None if text is None else json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        return None
    return AdapterSettings(**{field.name: values.get(field.name) for field in fields(AdapterSettings)})


def load_adapter(pipe: Any, path: str | Path, adapter_name: str = "sage") -> AdapterSettings | None:
    """Load a LoRA into a pipeline, and remember what it was trained for.

    Later calls of `sage.enable` and `sage.generate` without a `share` of their own use the adapter's. Also for pipelines that diffusers
    has no LoRA loader for (PixArt), with adapters that `sage train` wrote.

    Args:
        pipe: a diffusers pipeline of the model that the adapter was trained on.
        path: a .safetensors file, or the folder that holds `pytorch_lora_weights.safetensors`.
        adapter_name: what it is called in the pipeline.

    Returns:
        What it was trained for; None if the file does not say.

    Raises:
        InputError: there is no such file, or it is no LoRA of this pipeline. RuntimeError: peft is missing.
    """
    file = adapter_file(path)
    settings = read_adapter_settings(file)
    try:
        if hasattr(pipe, "load_lora_weights"):
            pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=adapter_name, local_files_only=True)
        else:
            _load_ourselves(pipe, file, adapter_name)
    except InputError:
        raise
    except Exception as error:  # diffusers and peft raise all kinds for a file that does not fit
        if isinstance(error, ImportError) or "peft backend is required" in str(error).lower():
            raise RuntimeError(f"load_adapter: LoRAs need peft ({error}); pip install peft") from error
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: cannot be loaded into this {type(pipe).__name__}: {reason}") from error
    if not _has(pipe, adapter_name):
        raise InputError(f"{path}: holds no LoRA layers of this {type(pipe).__name__}.")
    pipe._sage_adapter = (adapter_name, settings)
    return settings


def unload_adapter(pipe: Any) -> None:
    """Undo `load_adapter`, and take every other LoRA out of the pipeline too; does nothing to a pipeline without one."""
    from diffusers.utils.peft_utils import recurse_remove_peft_layers

    pipe.__dict__.pop("_sage_adapter", None)
    if hasattr(pipe, "unload_lora_weights"):
        pipe.unload_lora_weights()
    elif hasattr(pipe.transformer, "peft_config"):
        recurse_remove_peft_layers(pipe.transformer)
        del pipe.transformer.peft_config


def usual_share(pipe: Any, share: float | None = None) -> float:
    """`share` if it is given, else that of the adapter in the pipeline, else 0.4."""
    name, settings = pipe.__dict__.get("_sage_adapter", (None, None))
    if share is not None:
        return share
    known = settings is not None and settings.share is not None and _has(pipe, name)
    return settings.share if known else SHARE


def _has(pipe: Any, adapter_name: str) -> bool:
    """Whether a denoiser of the pipeline has this adapter."""
    modules = (getattr(pipe, name, None) for name in ("unet", "transformer", "transformer_2"))
    return any(adapter_name in (getattr(module, "peft_config", None) or {}) for module in modules)


def _metadata(file: Path) -> dict[str, str]:
    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: cannot be read as safetensors ({error}).") from None


def _load_ourselves(pipe: Any, file: Path, adapter_name: str) -> None:
    """For a transformer without a loader: the layers that the file's metadata describe, with its tensors."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    prefix, config = "transformer.", json.loads(_metadata(file).get(LORA_CONFIG, "null"))
    tensors = {key.removeprefix(prefix): value for key, value in load_file(file).items() if key.startswith(prefix)}
    if not config or not tensors:
        raise InputError(f"{file}: not an adapter that `sage train` wrote for a transformer; diffusers has no loader for a "
                         f"{type(pipe).__name__}.")  # fmt: skip
    if _has(pipe, adapter_name):
        raise InputError(f"{file}: the pipeline has an adapter {adapter_name!r} already; call sage.unload_adapter(pipe) first.")
    options = {key.removeprefix(prefix): value for key, value in config.items()}
    transformer = pipe.transformer
    inject_adapter_in_model(LoraConfig(**options), transformer, adapter_name)
    result = set_peft_model_state_dict(transformer, tensors, adapter_name)
    if result.unexpected_keys:
        unload_adapter(pipe)
        raise InputError(f"{file}: is of another model: it holds {result.unexpected_keys[0]}.")
    transformer.to(transformer.device, transformer.dtype).requires_grad_(False)
