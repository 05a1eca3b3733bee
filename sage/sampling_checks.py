"""What `sage.sample` refuses before the first denoiser call, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from sage.calls import HOW
from sage.families import RULES
from sage.plan_checks import fraction, integer
from sage.probe import Probe
from sage.rows import Rows
from sage.trunk import Trunk
from sage_kernels import CoefficientTable


def check_start(x_init: Any, leaves: int, table: CoefficientTable) -> None:
    """Refuse initial latents that are not [B, ...] in a dtype of the kernels, and a trunk of another table."""
    if isinstance(x_init, Trunk):
        x_init.check_table(table)
        return
    if not torch.is_tensor(x_init):
        raise TypeError(f"x_init must be a tensor [{leaves}, ...] or a sage.Trunk, got {type(x_init).__name__}")
    if x_init.ndim < 2 or len(x_init) != leaves:
        raise ValueError(f"x_init must be [{leaves}, ...], a row per leaf of the plan, got {tuple(x_init.shape)}")
    if x_init.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"x_init must be float32, bfloat16 or float16, got {x_init.dtype}")


def guidance_scales(guidance_scale: float | Sequence[float] | torch.Tensor, calls: int, leaves: int) -> np.ndarray:
    """float64 [S, B]: g of every leaf at every call, from one number, one per call, or a tensor with one per leaf."""
    if torch.is_tensor(guidance_scale):
        if tuple(guidance_scale.shape) != (leaves,):
            raise ValueError(f"guidance_scale must be a tensor [{leaves}], one per leaf of the plan, got {tuple(guidance_scale.shape)}")
        scales = np.tile(guidance_scale.detach().double().cpu().numpy(), (calls, 1))
    else:
        given = list(guidance_scale) if isinstance(guidance_scale, Sequence) else [guidance_scale] * calls
        if len(given) != calls:
            raise ValueError(
                f"guidance_scale must be one number, or one for each of the {calls} calls, got {len(given)}; for one per leaf pass a "
                "tensor"
            )
        scales = np.repeat(np.array(given, dtype=np.float64)[:, None], leaves, axis=1)
    if not np.isfinite(scales).all():
        raise ValueError(f"guidance_scale must be finite, got {guidance_scale}")
    return scales


def check_conditions(conditions: Any, negative: Any, guidance_scale: Any, guided: bool, leaves: int) -> None:
    """Refuse conditions without a row per leaf, of unknown names, or whose negatives are others or missing."""
    if guided and negative is None:
        raise ValueError(f"negative_conditions are required for guidance_scale {guidance_scale}; pass them or use 1.0")
    names = _names("conditions", conditions, leaves)
    if negative is not None and _names("negative_conditions", negative, leaves) != names:
        raise ValueError("negative_conditions must have the structure of conditions: a tensor, or a mapping of the same names")
    unknown = [name for name in names if name and name not in RULES]
    if unknown:
        raise ValueError(f"conditions[{unknown[0]!r}] has no rule that says how a group's rows become one; known: {', '.join(RULES)}")


def check_trunk_guidance(trunk_guidance: str) -> None:
    """Refuse a name that is no way to make a node's guidance."""
    if trunk_guidance not in HOW:
        raise ValueError(f"trunk_guidance must be one of {', '.join(map(repr, HOW))}, got {trunk_guidance!r}")


def check_alike(rows: Rows, conditions: Any) -> None:
    """Refuse nodes whose members differ in a condition that has one value for all of them (a picture's size, for example)."""
    for name, value in conditions.items() if isinstance(conditions, Mapping) else ():
        pair = rows.alike(value, 1) if RULES[name] == "alike" else None
        if pair is not None:
            raise ValueError(
                f"conditions[{name!r}] differs between leaves {pair[0]} and {pair[1]}, which the plan puts into one group; group only "
                "leaves that have the same"
            )


def check_noise(table: CoefficientTable, seeds: Any, noise: Any, leaves: int) -> None:
    """Refuse noise that is missing, given twice, or not one seed per leaf."""
    if seeds is not None and noise is not None:
        raise ValueError("seeds and noise exclude each other: pass seeds for noise inside the kernel, or noise to bring it")
    if table.stochastic and seeds is None and noise is None:
        raise ValueError(f"{table.solver} draws noise at every step: pass seeds (int64 [{leaves}]) or noise")
    if seeds is not None and not torch.is_tensor(seeds):
        raise TypeError(f"seeds must be an int64 tensor [{leaves}], got {type(seeds).__name__}; use torch.tensor(seeds)")
    if seeds is not None and (seeds.dtype != torch.int64 or tuple(seeds.shape) != (leaves,)):
        raise ValueError(f"seeds must be int64 [{leaves}], got {seeds.dtype} {tuple(seeds.shape)}")


def check_branch_noise(branch_noise: float, seeds: Any, noise: Any, on_part: Any) -> None:
    """Refuse a strength out of range, noise that nobody brings, and trunks of groups whose members part with noise."""
    if fraction(branch_noise, "branch_noise") == 0:
        return
    if seeds is None and noise is None:
        raise ValueError(f"branch_noise {branch_noise} gives every member noise of its own: pass seeds (int64, one per leaf) or noise")
    if on_part is not None:
        raise ValueError(
            f"branch_noise {branch_noise} and on_part exclude each other: what a later leaf could join is the state before its "
            "members' noise; keep trunks in a run without branch_noise"
        )


def check_branch_back(
    branch_back: int, table: CoefficientTable, branch_noise: float, seeds: Any, noise: Any, on_part: Any, captured: bool
) -> None:
    """Refuse a step back that is no whole number, that nobody brings noise for, that others exclude, and solvers without one."""
    if integer(branch_back, "branch_back", 0) == 0:
        return
    if seeds is None and noise is None:
        raise ValueError(f"branch_back {branch_back} gives every member noise of its own: pass seeds (int64, one per leaf) or noise")
    excluded = {
        "branch_noise": (branch_noise > 0, "both give a member its noise where its group parts; choose one"),
        "on_part": (on_part is not None, "a later leaf would join without a step back; keep trunks in a run without branch_back"),
        "graphs": (captured, "the calls made again have rows of their own; pass graphs=False, and no sage.CapturedDenoiser"),
    }
    for name, (given, reason) in excluded.items():
        if given:
            raise ValueError(f"branch_back {branch_back} and {name} exclude each other: {reason}")
    if table.levels is None or table.stage.any():
        reason = "what it stores is no denoised sample" if table.levels is None else "its steps have several denoiser calls"
        raise NotImplementedError(
            f"branch_back {branch_back} has no form for {table.solver}: {reason}; take ddim, ddpm, euler, euler-a, dpm++2m, dpm++3m, "
            "dpm++2m-sde, unipc or flow-euler, for example"
        )


def check_probe(probe: Any, branch_noise: float, branch_back: int = 0, on_part: Any = None, captured: bool = False) -> None:
    """Refuse what is no probe, and what must know where a group parts before the call in which a probe finds out."""
    if probe is None:
        return
    if not isinstance(probe, Probe):
        raise TypeError(f"probe must be a sage.Probe or None, got {type(probe).__name__}")
    excluded = {
        "branch_noise": (branch_noise > 0, "its noise belongs to the step before the call in which a probe parts a group"),
        "branch_back": (branch_back > 0, "a step back begins after a call, and a probe parts a group in the midst of one"),
        "on_part (keep_trunks)": (on_part is not None, "a trunk is kept before the call in which a probe parts its group"),
        "graphs": (captured, "how many rows a call has is known only as it is made; pass graphs=False, and no sage.CapturedDenoiser"),
    }
    for name, (given, reason) in excluded.items():
        if given:
            raise ValueError(f"probe and {name} exclude each other: {reason}; use one without the other")


def _names(what: str, given: Any, leaves: int) -> list[str]:
    """The names in `given` ("" for a lone tensor), after checking that every value has a row per leaf."""
    entries = dict(given) if isinstance(given, Mapping) else {"": given}
    for name, value in entries.items():
        where = f"{what}[{name!r}]" if name else what
        if not torch.is_tensor(value):
            raise TypeError(f"{where} must be a tensor{'' if name else ' or a mapping of tensors'}, got {type(value).__name__}")
        if value.ndim == 0 or len(value) != leaves:
            raise ValueError(f"{where} must have {leaves} rows, one per leaf of the plan, got {tuple(value.shape)}")
        if RULES.get(name or "encoder_hidden_states") in ("mean", "masked mean") and not value.is_floating_point():
            raise TypeError(f"{where} is averaged over a group and must have a floating dtype, got {value.dtype}; use {where}.float()")
    return sorted(entries)
