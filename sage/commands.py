"""What `sage plan` and `sage generate` do, step by step; sage/cli.py reads their options."""

from __future__ import annotations

import datetime
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from sage.adapters import AdapterSettings, adapter_file, load_adapter, read_adapter_settings
from sage.encoder_identity import file_sha256
from sage.info import command_line, machine, versions
from sage.loading import EMBEDDED, check_device, check_model, cut_prompts, load_model
from sage.output import OutputFolder, PictureSeries, digest, to_json, write_atomic
from sage.plan import SharingPlan
from sage.planning import Grouping, Planner, leaves_of, load_plan
from sage.prompts import InputError, check_seed, count, read_prompts

Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """Everything `sage generate` is told, apart from the prompts; None means the model's own default."""

    out: str
    model: str | None = None
    adapter: str | None = None
    grouping: Grouping = Grouping()
    plan: str | None = None
    steps: int | None = None
    solver: str | None = None
    seed: int = 0
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    max_rows: int = 64
    engine: str = "auto"
    device: str | None = None
    dtype: str | None = None
    compare: bool = False
    overwrite: bool = False
    resume: bool = False

    def check(self) -> None:
        """Refuse what is out of range or unknown, before anything is loaded."""
        self.grouping.check()
        if self.plan is not None and self.grouping.given:
            raise InputError(f"--plan and {', '.join(self.grouping.given)} exclude each other: the plan is made already.")
        for option in ("steps", "max_rows"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise InputError(f"--{option.replace('_', '-')} must be at least 1, got {value}.")
        check_seed(self.seed, "--seed")
        if self.guidance_scale is not None and not 0 <= self.guidance_scale < float("inf"):
            raise InputError(f"--guidance-scale must be a number of at least 0, got {self.guidance_scale:g}.")
        if self.solver is not None:
            check_solver(self.solver)
        check_device(self.device)
        if self.adapter is not None:
            self.adapter_settings()

    def adapter_settings(self) -> AdapterSettings | None:
        """What --adapter was trained for, None if its file does not say. Raises InputError if there is no such file."""
        try:
            return read_adapter_settings(self.adapter)
        except InputError as error:
            raise InputError(f"--adapter {error}") from None

    def trained_share(self) -> Request:
        """The request with the share that its adapter was trained for, where nothing else says how much is shared."""
        chosen = self.grouping.share is not None or self.grouping.aim != "share" or self.plan is not None
        settings = None if self.adapter is None or chosen else self.adapter_settings()
        if settings is None or settings.share is None:
            return self
        return replace(self, grouping=replace(self.grouping, share=settings.share))


def check_solver(solver: str) -> None:
    """Refuse a solver that is not in the table, listing those that are."""
    from sage.solvers import SOLVERS

    if solver not in SOLVERS:
        raise InputError(f"--solver {solver}: unknown; known solvers: {', '.join(SOLVERS)}.")


@dataclass(frozen=True)
class Outputs:
    """Files that `sage plan` writes; None: not."""

    plan: str | None = None
    plot: str | None = None
    html: str | None = None
    embeddings: str | None = None


def plan_prompts_of(
    source: str, grouping: Grouping, num_calls: int, rate: str | None, outputs: Outputs, model: dict, say: Say, progress: bool
) -> tuple[dict, SharingPlan]:
    """All of `sage plan`: look at everything, plan, write files.

    Args:
        source: name of the prompt file.
        grouping: checked options.
        num_calls: S, denoiser calls planned for.
        rate: --rate as it was typed.
        model: "model", "device" and "dtype", of which only the encoder "pipeline" makes use.
        say: takes remarks.
        progress: show bars.

    Returns:
        The plan in numbers, see `sage.plan_report.plan_summary`, and the plan.
    """
    from sage.plan_report import plan_summary, read_rate

    rows_per_second = read_rate(rate)
    prompts = read_prompts(source)
    check_model(model["model"])
    check_device(model["device"])
    for remark in prompts.remarks():
        say(remark)
    pipe = load_model(**model) if grouping.encoder == "pipeline" else None
    planner = Planner(prompts, grouping, num_calls, pipe, progress)
    if outputs.embeddings is not None:
        _save_embeddings(outputs.embeddings, planner)
    summary = plan_summary(planner, rows_per_second)
    if outputs.plan is not None:
        write_atomic(Path(outputs.plan), planner.plan.to_json() + "\n")
    if outputs.plot is not None:
        planner.plan.plot(outputs.plot, num_calls=num_calls)
    if outputs.html is not None:
        from sage.plan_page import plan_page

        write_atomic(Path(outputs.html), plan_page(summary, planner.plan))
    return summary, planner.plan


def _save_embeddings(path: str, planner: Planner) -> None:
    from sage.embed_files import save_embeddings

    try:
        save_embeddings(path, planner.prompts.prompts, planner.embeddings)
    except (OSError, ModuleNotFoundError) as error:
        raise InputError(f"--save-embeddings {path}: {error}") from error


class Generation:
    """One `sage generate`: looks at everything first, then makes the pictures."""

    def __init__(self, request: Request, source: str, say: Say, progress: bool = True):
        request.check()
        self.request, self.say, self.progress = request.trained_share(), say, progress
        self.prompts = read_prompts(source)
        self.images = request.grouping.images_per_prompt
        self.clock: dict[str, float] = {}
        self.written = 0  # pictures of this run that are on disk
        asked = leaves_of(self.prompts, self.images)
        self.fixed_plan = None if request.plan is None else load_plan(request.plan, asked)
        self.folder = OutputFolder(
            request.out,
            overwrite=request.overwrite,
            resume=request.resume,
            inputs=[file for file in (source, request.plan) if file is not None],
        )
        check_model(request.model)
        for remark in self.prompts.remarks():
            say(remark)

    def run(self) -> dict:
        """Plan, generate, compare, write. Returns the report."""
        request = self.request
        self.say(f"Loading {request.model or EMBEDDED} …")
        with self._timed("loading"):
            self.pipe = load_model(request.model, request.device, request.dtype)
            if request.adapter is not None:
                load_adapter(self.pipe, request.adapter)
        if request.solver is not None:
            check_fits(self.pipe.scheduler, request.solver)
        self.settings = self._settings()
        resumed = request.resume and self.folder.check_resumable(self.settings)
        former = self.folder.old_report() if resumed else {}
        remark = cut_prompts(self.pipe, self.prompts.prompts)
        if remark:
            self.say(remark)
        with self._timed("planning"):
            self.plan, self.cosines = self._make_plan(resumed)
        self._announce()
        self.report = {"state": "running", "command": command_line(), "settings": self.settings}
        self.report |= {"versions": versions(), "machine": machine(), "started": _now(), "seconds": self.clock}
        self.report |= {key: former[key] for key in ("stats", "unshared_stats") if key in former}
        if request.compare:
            self._warm_up()
        self.report["stats"] = self._sample("images", self.plan, resumed, former.get("stats"))
        self._write_report()  # so that a run that is stopped in its second half keeps what the first cost
        if request.compare:
            alone = SharingPlan.independent(self.plan.leaves)
            self.report["unshared_stats"] = self._sample("unshared", alone, resumed, former.get("unshared_stats"))
        return self._finish()

    def _make_plan(self, resumed: bool):
        """The plan with a seed on every leaf, and the cosines to each trunk (None for a plan that was passed in)."""
        from sage.generation import trunk_similarities
        from sage.seeds import seeded

        if self.fixed_plan is not None:
            plan, cosines = self.fixed_plan, None
        else:
            planner = Planner(self.prompts, self.request.grouping, self.settings["steps"], self.pipe, self.progress)
            plan, cosines = planner.plan, trunk_similarities(planner.plan, planner.embeddings.vectors, self.images)
        if resumed:
            saved = str(self.folder.path / "plan.json")
            plan = load_plan(saved, plan.leaves, f"--resume: the run's own plan {saved}")
        return seeded(plan, self.request.seed, self.prompts.seeds, self.images), cosines

    def _settings(self) -> dict:
        """Everything that decides what the pictures look like, defaults filled in."""
        request = self.request
        steps, guidance = call_defaults(self.pipe, embedded=request.model is None)
        return {
            "model": request.model or EMBEDDED,
            **({} if request.adapter is None else {"adapter": file_sha256(adapter_file(request.adapter))}),
            "prompts": digest([self.prompts.prompts, self.prompts.negative_prompts, self.prompts.seeds]),
            **request.grouping.settings(),
            "plan": None if self.fixed_plan is None else digest(self.fixed_plan.to_json()),
            "steps": request.steps or steps,
            "solver": request.solver,
            "seed": request.seed,
            "guidance_scale": guidance if request.guidance_scale is None else request.guidance_scale,
            "negative_prompt": request.negative_prompt,
            "dtype": str(self.pipe.dtype).removeprefix("torch."),
        }

    def _announce(self) -> None:
        """Say what is coming. Nothing has been written yet."""
        groups = sum(len(root.members) > 1 for root in self.plan.roots)
        alone = sum(len(root.members) == 1 for root in self.plan.roots)
        cost = self.plan.cost(self.settings["steps"])
        rows = f"{cost.nfe:,} denoiser rows instead of {cost.nfe_independent:,} ({cost.saving:.1%} saved)"
        if not self._one_call_per_step():
            rows = f"about {cost.saving:.0%} of the denoiser rows saved"
        self.say(f"{count(len(self.plan.leaves), 'picture')}: {count(groups, 'group')}, {alone} alone; {rows}.")

    def _one_call_per_step(self) -> bool:
        """Whether the denoiser calls are as many as the steps: not with two stages a step, nor with PNDM's extra ones."""
        import diffusers

        from sage.solvers import SOLVERS

        if self.request.solver is None:
            cls = type(self.pipe.scheduler)
        else:
            cls = getattr(diffusers, SOLVERS[self.request.solver][0])
        return getattr(cls, "order", 1) == 1 and cls.__name__ != "PNDMScheduler"

    def _warm_up(self) -> None:
        """Two steps of one picture that nobody sees, so that neither clock pays for what only the first call costs."""
        from sage.generation import generate

        with self._timed("warming up"):
            plan = SharingPlan.independent(self.plan.leaves[:1])
            generate(self.pipe, [plan.leaves[0].prompt], plan=plan, num_inference_steps=2, solver=self.request.solver,
                     engine=self.request.engine, guidance_scale=self.settings["guidance_scale"], progress=False)  # fmt: skip

    def _sample(self, folder: str, plan: SharingPlan, resumed: bool, former: dict | None) -> dict:
        """Make and write the pictures of a plan that are not there yet.

        Returns:
            The stats of what was made; `former`, those of the run that is resumed, when nothing was missing.
        """
        from sage.generation import generate

        series = self._series(folder)
        if resumed:
            series.load()
        open_roots = sorted({int(plan.root_of[index]) for index in series.missing})
        kept = len(plan.leaves) - len(series.missing)
        if kept:
            self.say(f"{folder}: {kept} of {count(len(plan.leaves), 'picture')} are there already.")
        if not open_roots:
            return former or {"pictures": 0, "kept": kept}
        part, originals = plan.subset(open_roots)
        negatives = self._negatives()
        with self._timed(folder):
            result = generate(
                self.pipe,
                [leaf.prompt for leaf in part.leaves],
                plan=part,
                negative_prompt=None if negatives is None else [negatives[i] for i in originals],
                num_inference_steps=self.settings["steps"],
                guidance_scale=self.settings["guidance_scale"],
                solver=self.request.solver,
                max_rows=self.request.max_rows,
                engine=self.request.engine,
                progress=self.progress,
                on_images=lambda indices, images, records: self._write(series, plan, originals, indices, images, records),
            )
        series.finish()
        return {"pictures": len(part.leaves), "kept": kept, **result.stats}

    def _series(self, folder: str) -> PictureSeries:
        about = {"model": self.settings["model"], "steps": self.settings["steps"], "solver": self._solver_name()}
        about |= {"guidance_scale": self.settings["guidance_scale"], "shared": folder == "images"}
        return PictureSeries(self.folder.path, folder, [leaf.prompt for leaf in self.plan.leaves], about)

    def _solver_name(self) -> str:
        from sage.solvers import solver_name

        return self.request.solver or solver_name(self.pipe.scheduler)

    def _write(self, series: PictureSeries, plan: SharingPlan, originals, indices, images, records) -> None:
        """Write the pictures of a pack, numbered as in the whole run. The first pack starts the folder."""
        if not self.written:
            self.folder.prepare()
            write_atomic(self.folder.path / "plan.json", self.plan.to_json() + "\n")
            self._write_report()
        numbers = [int(originals[index]) for index in indices]
        known = []
        for number, record in zip(numbers, records, strict=True):
            record = {**record, "group": int(plan.root_of[number])}
            if self.cosines is not None and plan is self.plan:
                record["similarity_to_trunk"] = float(self.cosines[number])
            known.append(record)
        series.add(numbers, images, known)
        self.written += len(numbers)

    def _negatives(self) -> list[str] | None:
        """Negative prompt of each picture: its line's own, else the one for all."""
        for_all, own = self.request.negative_prompt, self.prompts.negative_prompts
        if own is None and for_all is None:
            return None
        lines = own or [None] * len(self.prompts)
        return [for_all or "" if line is None else line for line in lines for _ in range(self.images)]

    def _finish(self) -> dict:
        from sage.gallery import write_gallery

        self.report |= {"state": "complete", "finished": _now()}
        self._write_report()
        self.gallery = write_gallery(self.folder.path)
        return self.report

    def _write_report(self) -> None:
        write_atomic(self.folder.path / "report.json", to_json(self.report, indent=1) + "\n")

    def _timed(self, name: str):
        return _Timer(self.clock, name)


class _Timer:
    def __init__(self, clock: dict[str, float], name: str):
        self.clock, self.name = clock, name

    def __enter__(self):
        self.start = time.perf_counter()

    def __exit__(self, *exc_info):
        self.clock[self.name] = time.perf_counter() - self.start


def call_defaults(pipe, *, embedded: bool) -> tuple[int, float | None]:
    """Steps and guidance that a call without them uses: the pipeline's own, or what suits the embedded model."""
    if embedded:
        from sage.emoji import GUIDANCE_SCALE, NUM_INFERENCE_STEPS

        return NUM_INFERENCE_STEPS, GUIDANCE_SCALE
    parameters = inspect.signature(type(pipe).__call__).parameters
    return parameters["num_inference_steps"].default, getattr(parameters.get("guidance_scale"), "default", None)


def check_fits(scheduler, solver: str) -> None:
    """Refuse a solver that was made for another kind of model than the one `scheduler` belongs to."""
    from sage.scheduler import SageScheduler

    try:
        SageScheduler.from_config(scheduler.config, solver=solver)
    except ValueError as error:
        raise InputError(f"--solver {solver}: {error}.") from None


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
