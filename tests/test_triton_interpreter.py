"""Runs triton_interpreted.py in a process of its own: Triton decides on import whether it interprets or compiles."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.deep
def test_kernels_equal_the_reference():
    command = [sys.executable, "-m", "pytest", "-q", Path(__file__).with_name("triton_interpreted.py")]
    result = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
