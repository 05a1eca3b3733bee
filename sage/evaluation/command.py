"""All of `sage evaluate`: look at everything, draw in two phases, judge, write."""

from __future__ import annotations

import datetime
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from sage.commands import call_defaults, check_fits
from sage.evaluation.asked import Asked, ask, read_source
from sage.evaluation.folder import EvaluationFolder, read_results
from sage.evaluation.identity import pipeline_identity
from sage.evaluation.knee import Knee, find_knee
from sage.evaluation.methods import Method, grid, methods_at, planned, rivals
from sage.evaluation.references import check_images, find_references
from sage.evaluation.report import short_table, table
from sage.evaluation.request import MAY_CHANGE, Request
from sage.info import command_line, machine, versions
from sage.loading import EMBEDDED, check_device, check_model, cut_prompts, load_model
from sage.output import digest, plain, to_json, write_atomic
from sage.prompts import InputError, count

if TYPE_CHECKING:
    from sage.evaluation.judge import Judge

__all__ = ["Evaluation", "render"]

DECIDING = ("sage-diffusion", "torch", "diffusers", "transformers")  # packages that decide pictures


class Evaluation:
    """One `sage evaluate`. Construction refuses what can be refused before a model is loaded.

    Args:
        request: all options.
        source: file of prompts, "-", or None for the embedded model's benchmark.
        say: takes remarks.
        progress: show bars.

    Raises:
        InputError: an option, a file or the output folder cannot be used.
    """

    def __init__(self, request: Request, source: str | None, say: Callable[[str], None], progress: bool = True):
        self.request, self.say, self.progress = request, say, progress
        self.remarks: list[str] = []
        request.check()
        check_device(request.device)
        check_model(request.model)
        self.source = read_source(source, request.images is not None, request.held_out)
        check_images(request.images, self.source)
        self.adapters = request.load_adapters()
        self.specs = list(request.extractors) or self._usual_extractors()
        inputs = [file for file in (source, request.images, *map(str, (a.path for a in self.adapters))) if file is not None]
        self.folder = EvaluationFolder(request.out, overwrite=request.overwrite, resume=request.resume, inputs=inputs)
        self.drawing = False  # whether something has been written

    def _usual_extractors(self) -> list[str]:
        if self.request.model is not None and self.source.records is None:
            raise InputError("--extractor must be given for a model of your own, such as clip:openai/clip-vit-base-patch32: the one that "
                             "comes with the package knows emoji only.")
        return ["emoji"]

    def run(self) -> dict[str, Any]:
        """Draw and judge everything. Returns what results.json holds."""
        from sage.evaluation.judge import QUICK_RESAMPLES, RESAMPLES, Judge
        from sage.evaluation.runner import Runner

        request = self.request
        self._load()
        settings = self._settings()
        former = self._former(settings)
        asked = self._ask()
        references = find_references(request.images, self.source, asked)
        self._remark_on(references)
        self.folder.prepare()
        self.started = _now()
        self.record = {"state": "running", "command": command_line(), "settings": settings, "versions": versions(), "machine": machine()}
        run = {"started": self.started, "machine": machine()["summary"], "versions": versions(),
               "asked": {name: settings[name] for name in MAY_CHANGE}}
        self.record["runs"] = [*(former or {}).get("runs", []), run]
        self._write("evaluation.json", self.record)
        runner = Runner(self.pipe, asked, self.folder, guidance_scale=settings["guidance_scale"], max_rows=request.max_rows,
                        run=self.started, say=self._remark, progress=self.progress)
        judge = Judge(asked, self.extractors, references, self.folder, QUICK_RESAMPLES if request.quick else RESAMPLES)
        judge.look_at_references()
        self.drawing = True
        solvers = [self._solver(solver, asked, judge, runner) for solver in request.solvers or [""]]
        return self._finish(asked, judge, references, solvers)

    def _load(self) -> None:
        from sage.evaluation.judge import check_extractors
        from sage.evaluation.switches import cache_refusal, check_adapters

        request = self.request
        self.say(f"Loading {request.model or EMBEDDED} …")
        self.pipe = load_model(request.model, request.device, request.dtype)
        self.pipe.set_progress_bar_config(disable=True)
        for solver in request.solvers:
            check_fits(self.pipe.scheduler, solver)
        check_adapters(self.pipe, self.adapters)
        self.extractors = check_extractors(self.specs, self.pipe.device)
        self.no_cache = cache_refusal(self.pipe) if "cache" in request.kinds else None

    def _settings(self) -> dict[str, Any]:
        """Everything that decides pictures and figures, defaults filled in."""
        from sage.encoders import find

        prompts, request = self.source.prompts, self.request
        guidance = call_defaults(self.pipe, embedded=request.model is None)[1]
        return {
            "model": request.model or EMBEDDED,
            "prompts": digest([prompts.prompts, prompts.negative_prompts, prompts.seeds]),
            **request.settings(),
            "extractor": self.specs,
            "guidance_scale": guidance if request.guidance_scale is None else request.guidance_scale,
            "dtype": str(self.pipe.dtype).removeprefix("torch."),
            "device": self.pipe.device.type,
            "weights": pipeline_identity(self.pipe),
            "encoder": find("auto", None, "cpu").identity(),
            "packages": {name: version for name, version in versions().items() if name in DECIDING},
        }

    def _former(self, settings: dict[str, Any]) -> dict | None:
        """The run to complete; None for a new one. Raises InputError where settings differ."""
        return self.folder.old_report() if self.request.resume and self.folder.check_resumable(settings) else None

    def _ask(self) -> Asked:
        """Group the prompts, and say what is coming."""
        request, prompts = self.request, self.source.prompts
        if cut := cut_prompts(self.pipe, prompts.prompts):
            self._remark(cut)
        if self.source.repeated:
            self._remark(f"{count(self.source.repeated, 'repeated prompt')} left out: each is drawn once.")
        asked = ask(self.source, images=request.seeds_per_prompt, seed=request.seed, similarity=request.similarity,
                    max_group_size=request.max_group_size, limit=request.most_prompts, everyone=request.everyone, pipe=self.pipe,
                    progress=self.progress)
        self.say(f"{count(asked.read, 'prompt')}, {asked.grouped} of them with a neighbour; evaluated: {len(asked.prompts)} in "
                 f"{count(len(asked.groups), 'group')}, {count(asked.images, 'picture')} each.")
        return asked

    def _solver(self, solver: str, asked: Asked, judge: Judge, runner: Any) -> dict[str, Any]:
        """Both phases of one solver: the grid and its knee, then everything at the knee and at the comfortable step counts."""
        from sage.evaluation.results import SolverResults
        from sage.solvers import solver_name

        request = self.request
        alone = {method: method.plan(asked) for method in grid(request, solver)}
        runner.draw(alone, "grid")
        bar = tqdm([method for method in alone if method.steps in request.grid], unit="method", desc="judging", disable=not self.progress)
        knee = find_knee({method.steps: judge.guards(method) for method in bar}, request.margin)
        reference = Method("independent", knee.steps or max(request.grid), solver)
        self._say_knee(solver, knee, reference)
        counts = list(dict.fromkeys([reference.steps, *request.more_counts]))
        candidates = [method for adapter in (None, *self.adapters) for steps in counts
                      for method in methods_at(steps, request, solver, adapter, self.no_cache is None)]
        plans = planned(candidates, asked, self._calls, self._remark)
        if "fewer-steps" in request.kinds:
            plans |= {method: method.plan(asked) for method in rivals(plans, {}) if method not in plans}
        runner.draw(plans, "methods", again=[reference])
        if "fewer-steps" in request.kinds:
            late = {method: method.plan(asked) for method in rivals({}, self._computed(plans, runner)) if method not in plans}
            runner.draw({reference: plans[reference]} | late, "rivals", again=[reference])
            plans |= late
        name = solver or solver_name(self.pipe.scheduler)
        found = SolverResults(name, [*alone, *plans], knee, reference, asked, judge, runner, request.margin).as_json()
        self._remark_on_knee(found)
        if "cache" in request.kinds and self.no_cache:
            found["unavailable"].append({"key": None, "label": "per-request cache", "kind": "cache", "steps": None, "value": None,
                                         "adapter": None, "why": self.no_cache})
        self.sheets = [*getattr(self, "sheets", []), *(method for method in (*alone, *plans) if method not in runner.unavailable)]
        return found

    def _say_knee(self, solver: str, knee: Knee, reference: Method) -> None:
        name = f"{solver}: " if solver else ""
        if knee.steps is None:
            self.say(f"{name}no step count is within the margin of every metric's best; the largest, {reference.steps}, is the reference.")
            return
        self.say(f"{name}the knee is at {count(knee.steps, 'step')}.")
        if knee.steps == min(self.request.grid) > 1:
            self._remark(f"{name}the knee is the least step count that was tried; fewer may be enough, so try fewer with --steps.")

    def _computed(self, plans: dict, runner: Any) -> dict[Method, float]:
        """Cached method → the fraction of the blocks that it computed, which is known once it is drawn."""
        from sage.evaluation.runner import costs, totals

        cached = [method for method in plans if method.kind == "cache" and method not in runner.unavailable]
        found = {method: totals(costs(self.folder, method))["computed"] for method in cached}
        return {method: share for method, share in found.items() if share is not None}

    def _remark_on_knee(self, found: dict[str, Any]) -> None:
        """Say where a step count that was drawn as a rival alone is as good as the knee."""
        fewer = [row["steps"] for row in found["methods"] if row["kind"] == "independent" and row["adapter"] is None and row["within"]
                 and row["steps"] < found["reference_steps"] and row["steps"] not in self.request.grid]
        if fewer:
            self._remark(f"{found['solver']}: {min(fewer)} steps, which --steps did not have, are within the margin too; savings are "
                         "counted from more than is needed, so try --steps with them.")

    def _remark_on(self, references: Any) -> None:
        """Say what the reference pictures are too few for."""
        if references is not None and references.count < self.extractors[0][1].dim:
            self._remark(f"{count(references.count, 'real picture')} for {self.extractors[0][1].dim} features: the Fréchet distance is "
                         "mostly bias then; compare it at equal numbers only.")

    def _calls(self, method: Method) -> int | None:
        """Denoiser calls of a method; None where they are not the steps: with two stages a step, or PNDM's extra ones."""
        import diffusers

        from sage.solvers import SOLVERS

        cls = getattr(diffusers, SOLVERS[method.solver][0]) if method.solver else type(self.pipe.scheduler)
        return method.steps if getattr(cls, "order", 1) == 1 and "PNDM" not in cls.__name__ else None

    def _finish(self, asked: Asked, judge: Judge, references: Any, solvers: list[dict]) -> dict[str, Any]:
        from sage.evaluation.judge import GUARDED
        from sage.evaluation.results import real_row, smallness
        from sage.evaluation.sheets import write_sheets

        titles = judge.titles()
        measured = {name for row in solvers[0]["methods"] for of in row["metrics"].values() for name in of}
        groups = sum(len(group) > 1 for group in asked.groups)
        results = {
            "kind": "sage evaluation",
            "version": 2,
            **self.record,
            "state": "complete",
            "finished": _now(),
            "prompts": {"source": self.source.prompts.source, "read": asked.read, "grouped": asked.grouped, "evaluated": len(asked.prompts),
                        "groups": groups, "images_per_prompt": asked.images, "pictures": asked.pictures,
                        "chance": groups / sum(len(group) for group in asked.groups if len(group) > 1),
                        "similarity": asked.similarity, "encoder": asked.embeddings.encoder},
            "metrics": {spec: {name: title for name, title in of.items() if name in measured} for spec, of in titles.items()},
            "resamples": judge.resamples,
            "guarded": [name for name in (*GUARDED, "diversity") if name in measured],
            "references": references and {"name": references.name, "pictures": references.count, "identity": references.identity,
                                          "groups": len(judge.real_groups())},
            "real": real_row(judge),
            "floor": {spec: judge.floor(spec) for spec in judge.names},
            "solvers": solvers,
            "remarks": self.remarks,
            "small": smallness(asked.pictures, groups),
        }
        results = json.loads(to_json(results))
        self._write("results.json", results)
        write_atomic(self.folder.path / "table.md", table(results))
        _write_plot(results, self.folder.path / "plot.png")
        several = len(self.request.solvers) > 1
        drawn = sorted(dict.fromkeys(self.sheets), key=lambda method: (method.solver, method.kind != "independent", -method.steps))
        write_sheets(self.folder, [(method, _sheet_name(method, several)) for method in drawn], asked)
        self._write("evaluation.json", {**self.record, "state": "complete"})
        return results

    def _write(self, name: str, value: Any) -> None:
        write_atomic(self.folder.path / name, to_json(plain(value), indent=1) + "\n")

    def _remark(self, text: str) -> None:
        """Say something that also belongs into the results."""
        self.remarks.append(text)
        self.say(text)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _sheet_name(method: Method, with_solver: bool) -> str:
    parts = [method.label, f"{method.steps} steps", method.solver if with_solver else "", method.adapter.name if method.adapter else ""]
    return ", ".join(part for part in parts if part)


def _write_plot(results: dict[str, Any], path: Path) -> None:
    from sage.evaluation.plot import plot

    buffer = io.BytesIO()
    plot(results, buffer)
    write_atomic(path, buffer.getvalue())


def render(path: str, out: str | None) -> str:
    """The short table of a results.json; with `out`, table.md and plot.png are written anew into that folder.

    Raises:
        InputError: no results, or no such folder.
    """
    results = read_results(path)
    if out is not None:
        folder = Path(out)
        if not folder.is_dir():
            raise InputError(f"--out {out}: no such folder.")
        write_atomic(folder / "table.md", table(results))
        _write_plot(results, folder / "plot.png")
    return short_table(results)
