"""What is timed: the device is waited for at both ends, first calls and other runs are left out."""

import pytest
import tiny
import torch

import sage
from sage.clock import now

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("device", "waits"), [("cpu", []), ("cuda:1", [torch.device("cuda:1")])])
def test_only_a_gpu_is_waited_for(device, waits, monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    assert now(torch.device(device)) <= now(torch.device("cpu")) and waited == waits


@pytest.mark.parametrize(("engine", "place"), [("hook", "sage.run.now"), ("native", "sage.native.loop.now")])
def test_a_call_reads_the_devices_clock_before_and_after_denoising(engine, place, monkeypatch):
    """Not once for every step: that would keep a GPU from running ahead."""
    pipe = tiny.stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    times = iter((10.0, 13.5))
    monkeypatch.setattr(place, lambda device: next(times))
    result = sage.generate(pipe, ["a red cat", "a red car"], share=0, num_inference_steps=3, engine=engine, progress=False)
    assert result.stats["denoise_seconds"] == 3.5 and next(times, None) is None
