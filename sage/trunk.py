"""Trunks: the state of a group just before it parts, kept so that pictures asked for later can join it.

    trunks = {}
    sage.sample(denoise, plan, table, x_init, conditions, on_part=trunks.__setitem__)
    trunks[0].save("foxes.safetensors")

    trunk = sage.Trunk.load("foxes.safetensors")                             # another day, other prompts
    x = sage.sample(denoise, later_plan, table, trunk, later_conditions)     # the calls before the parting are not run again
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sage.calls import first_call
from sage.plan_checks import integer
from sage_kernels import CoefficientTable

FORMAT, VERSION = "sage-diffusion trunk", 1
_KEYS = ("call", "solver", "timesteps", "coefficients", "record", "content")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_HISTORY = 3


@dataclass(frozen=True)
class Fingerprint:
    """Which coefficient table a trunk belongs to.

    Args:
        solver: its name.
        timesteps: what the denoiser is called with, [S].
        coefficients: 128 bits of BLAKE2b of its float32 rows and stages, in hexadecimal.
    """

    solver: str
    timesteps: tuple[float, ...]
    coefficients: str

    @classmethod
    def of(cls, table: CoefficientTable) -> Fingerprint:
        digest = hashlib.blake2b(table.rows.astype("<f4").tobytes(), digest_size=16)
        digest.update(np.asarray(table.stage).astype("<i8").tobytes())
        return cls(table.solver, tuple(map(float, table.timesteps)), digest.hexdigest())

    def difference(self, other: Fingerprint) -> str:
        """What differs, this one's value first; "" if nothing does."""
        if self.solver != other.solver:
            return f"the solver is {self.solver!r} there and {other.solver!r} here"
        if len(self.timesteps) != len(other.timesteps):
            return f"there are {len(self.timesteps)} denoiser calls there and {len(other.timesteps)} here"
        for call, (there, here) in enumerate(zip(self.timesteps, other.timesteps)):
            if there != here:
                return f"the timestep of call {call} is {there:g} there and {here:g} here"
        if self.coefficients != other.coefficients:
            return "the coefficients differ (the first call, the order, the prediction type, the noise schedule or eta)"
        return ""


@dataclass(frozen=True, eq=False)
class Trunk:
    """The state of a group between two denoiser calls, just before it parts; every tensor has one row.

    Given to `sage.sample` in place of the initial latents, it takes every leaf of a plan to where the group parted: a leaf
    that joins gives what it would have given as a member, had the group's mean condition been the same.

    Args:
        sample: [1, ...], the latents, at the noise level of `call`; in the dtype of the solver's state.
        model_input: [1, ...], what the denoiser is given at `call`, in the dtype of its inputs.
        history: m1, m2, m3, what the solver stored in the calls before, newest first; as many as it reads.
        last_sample: [1, ...], the corrected sample of the call before; None where the solver keeps none.
        call: the denoiser call that comes next, counted in the table.
        table: the table's fingerprint.
        record: for people, JSON: `prompts` of the members, `prompt` and `seed` of the representative, `encoder`, and whatever
            else is useful.
    """

    sample: torch.Tensor
    model_input: torch.Tensor
    history: tuple[torch.Tensor, ...]
    last_sample: torch.Tensor | None
    call: int
    table: Fingerprint
    record: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "history", tuple(self.history))
        if len(self.history) > _MOST_HISTORY:
            raise ValueError(f"Trunk: history must hold at most {_MOST_HISTORY} tensors, got {len(self.history)}")
        _check_tensors(self._tensors())
        if not 0 < integer(self.call, "Trunk: call") < len(self.table.timesteps):
            raise ValueError(f"Trunk: call must be one of the calls 1 to {len(self.table.timesteps) - 1}, got {self.call}")

    def check_table(self, table: CoefficientTable) -> None:
        """Refuse, with what differs, a table other than the one that the trunk was made with.

        Raises:
            ValueError: also where the trunk does not hold what the table's solver remembers at `call`.
        """
        difference = self.table.difference(Fingerprint.of(table))
        if difference:
            raise ValueError(f"the trunk was made with another coefficient table: {difference}; set the scheduler up as it was")
        stored = min(self.call - first_call(table), table.history)
        if len(self.history) != stored or (self.last_sample is not None) != table.corrector:
            raise ValueError(
                f"the trunk must hold what {table.solver} remembers at call {self.call}: {stored} of history and "
                f"{'a' if table.corrector else 'no'} last_sample, got {len(self.history)} and "
                f"{'none' if self.last_sample is None else 'one'}"
            )

    def to(self, device: torch.device | str) -> Trunk:
        """The trunk with its tensors on a device."""
        last = None if self.last_sample is None else self.last_sample.to(device)
        history = tuple(stored.to(device) for stored in self.history)
        return replace(
            self, sample=self.sample.to(device), model_input=self.model_input.to(device), history=history, last_sample=last
        )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; its metadata holds the rest, as JSON."""
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self._tensors().items()}
        values = (self.call, self.table.solver, self.table.timesteps, self.table.coefficients, self.record, _content(tensors))
        try:
            text = json.dumps(dict(zip(_KEYS, values)), ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"Trunk.save: record must hold what JSON can say: {error}") from None
        save_file(tensors, path, metadata={"format": FORMAT, "version": str(VERSION), "trunk": text})

    @classmethod
    def load(cls, path: str | Path) -> Trunk:
        """Read a file that `save` wrote, onto the CPU.

        Raises:
            FileNotFoundError: there is no such file. ValueError: it is another file, damaged, or from a newer version; the
            message says what is wrong.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"Trunk.load: there is no file {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"Trunk.load: {path} is damaged, or no safetensors file: {error}") from None
        try:
            return cls._read(metadata, tensors)
        except (TypeError, ValueError) as error:
            raise ValueError(f"Trunk.load: {path}: {error}") from None

    @classmethod
    def _read(cls, metadata: Mapping[str, str], tensors: dict[str, torch.Tensor]) -> Trunk:
        data = _header(metadata)
        if _content(tensors) != data["content"]:
            raise ValueError("its tensors are not those that were saved: the file is damaged")
        stored = [f"history.{k}" for k in range(sum(name.startswith("history.") for name in tensors))]
        missing = [name for name in ("sample", "model_input", *stored) if name not in tensors]
        unknown = tensors.keys() - {"sample", "model_input", "last_sample", *stored}
        if missing or unknown:
            raise ValueError(f"it lacks the tensor {missing[0]}" if missing else f"it has an unknown tensor {min(unknown)}")
        history = tuple(tensors[name] for name in stored)
        table = Fingerprint(data["solver"], tuple(map(float, data["timesteps"])), data["coefficients"])
        state = (tensors["sample"], tensors["model_input"], history, tensors.get("last_sample"))
        return cls(*state, data["call"], table, data["record"])

    def _tensors(self) -> dict[str, torch.Tensor]:
        named = {"sample": self.sample, "model_input": self.model_input}
        named |= {f"history.{k}": stored for k, stored in enumerate(self.history)}
        return named if self.last_sample is None else named | {"last_sample": self.last_sample}


def _check_tensors(tensors: Mapping[str, torch.Tensor]) -> None:
    """One row each, of one shape, in dtypes that the kernels take; all but the model input in one dtype."""
    for name, tensor in tensors.items():
        if not torch.is_tensor(tensor) or tensor.dtype not in _DTYPES:
            got = tensor.dtype if torch.is_tensor(tensor) else type(tensor).__name__
            raise TypeError(f"Trunk: {name} must be a float32, bfloat16 or float16 tensor, got {got}")
        if tensor.ndim < 2 or len(tensor) != 1 or tensor.shape != tensors["sample"].shape:
            wanted = (1, *tensors["sample"].shape[1:])
            raise ValueError(f"Trunk: {name} must be one row {wanted}, got {tuple(tensor.shape)}")
        if name != "model_input" and tensor.dtype != tensors["sample"].dtype:
            raise TypeError(f"Trunk: {name} must have the dtype of sample, {tensors['sample'].dtype}, got {tensor.dtype}")


def _content(tensors: Mapping[str, torch.Tensor]) -> str:
    """128 bits of BLAKE2b over names, dtypes, shapes and values, in hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _header(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The JSON in the metadata, strictly read."""
    if metadata.get("format") != FORMAT:
        raise ValueError(f'it holds no trunk: wanted "format": "{FORMAT}" in its metadata, got {metadata.get("format")!r}')
    if metadata.get("version") != str(VERSION):
        raise ValueError(f"version must be {VERSION}, got {metadata.get('version')}; it may come from a newer sage-diffusion")
    try:
        data = json.loads(metadata.get("trunk", ""))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'"trunk" in its metadata is not JSON: {error}') from None
    if not isinstance(data, dict) or set(data) != set(_KEYS):
        got = ", ".join(data) if isinstance(data, dict) else type(data).__name__
        raise ValueError(f'"trunk" in its metadata must have the keys {", ".join(_KEYS)}, got {got}')
    kinds = {"call": int, "solver": str, "timesteps": list, "coefficients": str, "record": dict, "content": str}
    for key, kind in kinds.items():
        if not isinstance(data[key], kind) or isinstance(data[key], bool):
            raise ValueError(f'"{key}" in its metadata must be a {kind.__name__}, got {data[key]!r:.60}')
    if not all(isinstance(t, (int, float)) and not isinstance(t, bool) for t in data["timesteps"]):
        raise ValueError('"timesteps" in its metadata must hold numbers')
    return data
