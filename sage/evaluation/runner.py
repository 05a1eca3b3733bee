"""Draws every method's pictures, chunk by chunk over all methods, and notes what each chunk cost.

A chunk is some whole groups. All methods draw the first chunk, then all draw the second, so what slows the machine for a while slows
all of them. What is on disk is not drawn again: a run that was stopped goes on at the chunk, and costs add up over `calls.jsonl`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from sage.evaluation.asked import Asked
from sage.evaluation.folder import EvaluationFolder
from sage.evaluation.methods import Method
from sage.evaluation.switches import adapted, cached
from sage.generation import generate
from sage.output import PictureSeries, read_manifest, to_json
from sage.plan import SharingPlan

__all__ = ["Runner", "calls", "clocked", "costs", "file_names", "sha256s", "totals"]

LEAST_CHUNKS = 3  # where there are pictures enough for them


class Runner:
    """Draws methods into their folders.

    Args:
        pipe: on its device.
        asked: what is drawn.
        folder: prepared.
        guidance_scale: None: the model's own.
        max_rows: as for `sage.generate`.
        run: name of this run, for `calls.jsonl`.
        say: takes remarks.
        progress: show bars.

    Attributes:
        unavailable: method → why it cannot be drawn with this pipeline.
        chunks: numbers of the groups of each chunk.
    """

    def __init__(self, pipe: Any, asked: Asked, folder: EvaluationFolder, *, guidance_scale: float | None, max_rows: int, run: str,
                 say: Callable[[str], None], progress: bool):
        self.pipe, self.asked, self.folder, self.say, self.progress = pipe, asked, folder, say, progress
        self.options = {"guidance_scale": guidance_scale, "max_rows": max_rows, "progress": False}
        self.run = run
        self.chunks = asked.chunks(min(2 * max_rows, max(16, asked.pictures // LEAST_CHUNKS)))
        self.unavailable: dict[Method, str] = {}
        self._warm = False

    def draw(self, plans: Mapping[Method, SharingPlan], phase: str, again: Sequence[Method] = ()) -> None:
        """Draw what is not there yet.

        Args:
            plans: of each method, over all pictures.
            phase: "grid", "methods" or "rivals": seconds are comparable within one.
            again: methods whose pictures are there; they are drawn once more wherever another method is drawn in this phase, so that
                there is a clock to compare with.
        """
        series = {method: self._series(method) for method in plans}
        done = {method: costs(self.folder, method).keys() for method in plans if method not in again}
        with tqdm(total=len(plans) * len(self.chunks), unit="chunk", desc=phase, disable=not self.progress) as bar:
            for number, chunk in enumerate(self.chunks):
                parts = {method: _part(plan, self.asked, chunk) for method, plan in plans.items()}
                there = [method for method in done if number in done[method]
                         and all(picture in series[method].rows for picture in parts[method][1].tolist())]
                missing = [method for method in done if method not in there and method not in self.unavailable]
                repeated = [method for method in again if missing and not self._was_clocked(method, phase, number)]
                for method in plans:
                    bar.set_description(f"{method.steps} steps, {method.label}")
                    bar.update()
                    if method in missing or method in repeated:
                        self._draw_chunk(method, *parts[method], series[method], {"phase": phase, "chunk": number})
        for kept in series.values():
            if not kept.missing:
                kept.finish()

    def _was_clocked(self, method: Method, phase: str, chunk: int) -> bool:
        """Whether a chunk was drawn in this phase by this very run."""
        return any((row["phase"], row["run"], row["chunk"]) == (phase, self.run, chunk) for row in calls(self.folder, method))

    def _draw_chunk(self, method: Method, plan: SharingPlan, pictures: np.ndarray, series: PictureSeries, about: dict) -> None:
        try:
            with adapted(self.pipe, method.adapter), cached(self.pipe, method.value if method.kind == "cache" else None):
                self._warm_up(plan, method)
                result = self._generate(method, plan, pictures)
        except (NotImplementedError, ValueError) as error:
            if method.kind not in ("step-back", "cache"):
                raise
            self.unavailable[method] = " ".join(str(error).split())  # said before the first denoiser call
            self.say(f"{method.label}: not for this pipeline and solver ({self.unavailable[method]}).")
            return
        series.add(pictures, result.images, result.records)
        cost = {name: result.stats[name] for name in ("nfe", "nfe_independent", "guidance_copies", "denoise_seconds", "seconds", "cache")}
        counts = {"num_calls": result.records[0]["num_calls"], "branch_calls": sorted({record["branch_call"] for record in result.records})}
        _append(self._calls(method), {**about, "run": self.run, "pictures": len(pictures), **cost, **counts})

    def _generate(self, method: Method, plan: SharingPlan, pictures: np.ndarray):
        prompts = [leaf.prompt for leaf in plan.leaves]
        negatives = self.asked.negatives
        if negatives is not None:
            negatives = [negatives[number // self.asked.images] or "" for number in pictures]
        return generate(self.pipe, prompts, plan=plan, negative_prompt=negatives, num_inference_steps=method.steps,
                        solver=method.solver or None, branch_back=method.branch_back, **self.options)

    def _warm_up(self, plan: SharingPlan, method: Method) -> None:
        """Two steps of one picture that nobody sees, so that no method pays for what only the first call costs."""
        if not self._warm:
            self._warm = True
            self._generate(Method("independent", 2, method.solver), SharingPlan.independent(plan.leaves[:1]), np.zeros(1, int))

    def _series(self, method: Method) -> PictureSeries:
        about = {"method": method.label, "steps": method.steps, "solver": method.solver or None,
                 "adapter": method.adapter and method.adapter.name}
        series = PictureSeries(self.folder.method(method.key), "images", self.asked.picture_prompts, about)
        series.load()
        return series

    def _calls(self, method: Method) -> Path:
        return self.folder.method(method.key) / "calls.jsonl"


def _part(plan: SharingPlan, asked: Asked, chunk: Sequence[int]) -> tuple[SharingPlan, np.ndarray]:
    """The plan of a chunk's groups, and its pictures' numbers."""
    clusters = asked.clusters()
    wanted = {picture for number in chunk for picture in clusters[number]}
    return plan.subset([number for number, root in enumerate(plan.roots) if root.members[0] in wanted])


def _append(path: Path, row: dict) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(to_json(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def calls(folder: EvaluationFolder, method: Method) -> list[dict]:
    """What every chunk cost, in the order in which they were drawn."""
    return [row for row in read_manifest(folder.path / "methods" / method.key / "calls.jsonl") if isinstance(row.get("chunk"), int)]


def costs(folder: EvaluationFolder, method: Method) -> dict[int, dict]:
    """Chunk → what it cost, the last time that it was drawn."""
    return {row["chunk"]: row for row in calls(folder, method)}


def clocked(folder: EvaluationFolder, method: Method, phase: str, warm: bool) -> dict[tuple[str, int], dict]:
    """(run, chunk) → what it cost in a phase: seconds are comparable for the same run and chunk.

    Args:
        warm: without the first chunk of every run, which also pays for what a first call of this kind and size costs.
    """
    found: dict[tuple[str, int], dict] = {}
    seen: set[str] = set()
    for row in calls(folder, method):
        if row["phase"] == phase:
            if row["run"] in seen or not warm:
                found[row["run"], row["chunk"]] = row
            seen.add(row["run"])
    return found


def file_names(folder: EvaluationFolder, method: Method) -> list[Path]:
    """The pictures of a method, in order, as its manifest lists them."""
    root = folder.path / "methods" / method.key
    rows = {row["index"]: root / row["file"] for row in read_manifest(root / "manifest.jsonl")}
    return [rows[number] for number in sorted(rows)]


def sha256s(folder: EvaluationFolder, method: Method) -> list[str]:
    """Of a method's pictures, in order."""
    rows = {row["index"]: row["sha256"] for row in read_manifest(folder.path / "methods" / method.key / "manifest.jsonl")}
    return [rows[number] for number in sorted(rows)]


def totals(rows: Mapping[int, dict]) -> dict[str, Any]:
    """The cost of all chunks together: nfe, pictures, and how much of the blocks a cache computed (1 without one)."""
    parts = list(rows.values())
    found = {name: sum(part[name] for part in parts) for name in ("pictures", "nfe")}
    computed = [1.0 if part["cache"] is None else part["cache"]["computed"] for part in parts]
    known = all(share is not None for share in computed)
    found["computed"] = sum(share * part["nfe"] for share, part in zip(computed, parts)) / found["nfe"] if known else None
    found |= {name: parts[0][name] for name in ("guidance_copies", "num_calls")}
    found["branch_calls"] = sorted({call for part in parts for call in part["branch_calls"]})
    return found

