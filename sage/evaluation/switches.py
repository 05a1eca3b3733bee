"""What is switched on for one method and off again after it: a LoRA, or a cache in the denoiser."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sage.adapters import load_adapter, unload_adapter
from sage.denoiser import denoisers_of
from sage.prompts import InputError

if TYPE_CHECKING:
    from sage.evaluation.request import Adapter

__all__ = ["adapted", "cache_refusal", "cached", "check_adapters"]


@contextlib.contextmanager
def adapted(pipe: Any, adapter: Adapter | None) -> Iterator[None]:
    """The pipeline with a LoRA, unfused; it is taken out again, so that nothing of it is left or costs time.

    Raises:
        InputError: the file is no LoRA of this model. RuntimeError: peft is missing.
    """
    if adapter is None:
        yield
        return
    try:
        load_adapter(pipe, adapter.path)
    except InputError as error:
        raise InputError(f"--adapter {error}") from None
    try:
        yield
    finally:
        unload_adapter(pipe)


def check_adapters(pipe: Any, adapters: list[Adapter]) -> None:
    """Load each LoRA once. Raises as `adapted`."""
    for adapter in adapters:
        with adapted(pipe, adapter):
            pass


@contextlib.contextmanager
def cached(pipe: Any, threshold: float | None) -> Iterator[None]:
    """The pipeline with a FirstBlockCache on every denoiser; None: without."""
    if threshold is None:
        yield
        return
    from diffusers import FirstBlockCacheConfig

    modules = list(denoisers_of(pipe).values())
    try:
        for module in modules:
            module.enable_cache(FirstBlockCacheConfig(threshold=threshold))
        yield
    finally:
        for module in modules:
            if getattr(module, "is_cache_enabled", False):
                module.disable_cache()


def cache_refusal(pipe: Any) -> str | None:
    """Why no cache of diffusers runs in this denoiser; None if one does."""
    names = sorted({type(module).__name__ for module in denoisers_of(pipe).values()})
    if not all(hasattr(module, "enable_cache") for module in denoisers_of(pipe).values()):
        return f"none for this denoiser ({', '.join(names)} has no cache in diffusers)"
    try:
        with cached(pipe, 0.05):
            pass
    except Exception as error:  # a denoiser whose blocks diffusers' hooks do not know
        return f"none for this denoiser (FirstBlockCache on {', '.join(names)}: {' '.join(str(error).split())[:120]})"
    return None
