"""Seconds of work on a device."""

import time

import torch

__all__ = ["now"]


def now(device: torch.device) -> float:
    """The time in seconds, from any start, once the device has done what it was given: only CUDA works on while its caller goes on."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
