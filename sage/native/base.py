"""What the native loop needs of a pipeline: its call in parts, and which arguments and features those parts cover."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from sage.caches import cache_hooks
from sage.denoiser import denoisers_of

_SHOWN = 60  # characters of a refused value


class NotNative(NotImplementedError):
    """The native loop does not cover this call; the message says which argument or feature keeps it out."""


class Adapter:
    """One call of a pipeline, taken apart; a family is a subclass. The parts run in the order of the methods below.

    Args:
        pipe: the pipeline.
        call_kwargs: arguments of its call, without prompts, negative prompts and generators.

    Attributes:
        asked: the values of the honoured arguments, the pipeline's defaults where none was given.
        guided: whether the call doubles its rows for classifier-free guidance; known once the inputs are checked.
        guides_apart: the pipeline's own loop makes two denoiser calls for that, each with one row per picture. Then the rows
            of a picture need not stay in one call here either.

    Raises:
        NotNative: an argument that is not honoured has another value than its default, or a feature is on that is not covered.
    """

    arguments: tuple[str, ...] = ()  # what the adapter honours of the pipeline's call
    guides_apart = False
    guided: bool

    def __init__(self, pipe, call_kwargs: Mapping[str, Any]):
        self.pipe, self.device = pipe, pipe._execution_device
        self.asked = _asked(pipe, call_kwargs, self.arguments)
        _refuse_caches(pipe)
        _refuse_device_maps(pipe)

    def denoisers(self) -> list[torch.nn.Module]:
        """The modules that `denoise` calls."""
        return list(denoisers_of(self.pipe).values())

    def check_inputs(self, prompts: list[str], negatives: list[str] | None) -> None:
        """The pipeline's own check of its arguments."""
        raise NotImplementedError

    def check_probe(self) -> None:
        """Refuse a `sage.Probe` where `denoise` gives something else than the denoiser's raw output, which is what it compares.

        Raises:
            NotNative.
        """

    def schedule(self) -> None:
        """Set the scheduler's timesteps as the pipeline does."""
        raise NotImplementedError

    def step_arguments(self, generators: list[torch.Generator]) -> dict[str, Any]:
        """What the pipeline passes on to `scheduler.step`: maybe `generator`, maybe `eta`."""
        return {}

    def encode(self, prompts: list[str], negatives: list[str] | None) -> tuple[dict, dict | None]:
        """Conditions and negative conditions, each a mapping of the denoiser's argument name → [B, ...]; None without guidance.

        The names are those of `sage.families.RULES`, also where the denoiser takes them inside another argument.
        """
        raise NotImplementedError

    def latents(self, dtype: torch.dtype, generators: list[torch.Generator]) -> torch.Tensor:
        """[B, ...], drawn from the generators by the pipeline's own `prepare_latents`.

        Args:
            dtype: of the encoded prompts.
        """
        raise NotImplementedError

    def guidance_scale(self, timesteps: list[float]) -> float | list[float]:
        """g for all denoiser calls, or one per call at `timesteps`; asked for under guidance only."""
        return self.asked.guidance_scale

    def denoise(self, model_input: torch.Tensor, timestep: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
        """`denoise` of `sage.sample`: [R, ...] → the model output [R, ...], contiguous.

        Args:
            timestep: 0-dim float32, as in the scheduler's `timesteps`.
        """
        raise NotImplementedError

    def decode(self, latents: torch.Tensor, generators: list[torch.Generator]) -> Any:
        """[B, ...] → what the pipeline returns for `output_type`."""
        raise NotImplementedError


def _asked(pipe, call_kwargs: Mapping[str, Any], honoured: tuple[str, ...]) -> SimpleNamespace:
    """The values of the honoured arguments; refuses every other one that is not at its default."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    for name, value in call_kwargs.items():
        if name in honoured or (name in parameters and _same(value, parameters[name].default)):
            continue
        shown = repr(value)
        shown = shown if len(shown) <= _SHOWN else type(value).__name__
        raise NotNative(
            f"{type(pipe).__name__}: the native loop leaves the argument {name} at its default, got {shown}; omit it, or call the "
            "pipeline inside sage.enable"
        )
    return SimpleNamespace(**{name: call_kwargs.get(name, parameters[name].default) for name in honoured})


def _same(value: Any, default: Any) -> bool:
    plain = (bool, int, float, str, list, tuple)
    return value is default or (isinstance(value, plain) and isinstance(default, plain) and value == default)


def _refuse_caches(pipe) -> None:
    """Refuse what skips work by what earlier calls left behind: it goes by the calls of the pipeline's own loop."""
    hooks = cache_hooks(pipe)
    if hooks:
        raise NotNative(
            f"{type(pipe).__name__}: a cache is on ({hooks[0]}), which the native loop does not know; disable it (disable_cache), or "
            "call the pipeline inside sage.enable"
        )


def _refuse_device_maps(pipe) -> None:
    devices = set(map(str, (getattr(pipe, "hf_device_map", None) or {}).values()))
    if len(devices) > 1:
        raise NotNative(
            f"{type(pipe).__name__}: its modules are spread over {', '.join(sorted(devices))} by a device map, and the native loop "
            "runs on one device; move them together, or call the pipeline inside sage.enable"
        )
