"""Costs and measurements → what results.json holds: rows, differences with intervals, verdicts, and what to take as default."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from tqdm.auto import tqdm

from sage.evaluation.asked import Asked
from sage.evaluation.judge import Judge
from sage.evaluation.knee import Knee, Measurement, within
from sage.evaluation.methods import Method
from sage.evaluation.runner import Runner, calls, clocked, costs, totals

__all__ = ["SolverResults", "bar", "name_of", "real_row", "sentence", "smallness", "words"]

FEW_GROUPS, FEW_PICTURES = 50, 400  # below either, no claim
NEAR = 0.1  # by how much the rows of a rival may differ


class SolverResults:
    """Everything of one solver.

    Args:
        solver: its name, as the pipeline calls it.
        methods: all that were drawn, and those that could not be.
        knee: of its grid.
        reference: independent sampling at the knee, or where there is none at the largest step count.
        margin: relative.
    """

    def __init__(self, solver: str, methods: Iterable[Method], knee: Knee, reference: Method, asked: Asked, judge: Judge, runner: Runner,
                 margin: float):
        self.solver, self.knee, self.reference, self.margin = solver, knee, reference, margin
        self.asked, self.judge, self.runner, self.folder = asked, judge, runner, runner.folder
        methods = sorted(dict.fromkeys(methods), key=_order)
        self.unavailable = {method: reason for method, reason in runner.unavailable.items() if method in methods}
        self.methods = [method for method in methods if method not in self.unavailable]
        self.cost = {method: totals(costs(self.folder, method)) for method in self.methods}
        # What a metric is judged against: the best that independent sampling has, as for the knee. The most diverse pictures are no
        # aim, so diversity is that of the reference.
        self.bars = {name: replace(reference, steps=steps) for name, steps in knee.best.items()} | {"diversity": reference}

    def as_json(self) -> dict[str, Any]:
        bar = tqdm(self.methods, unit="method", desc="judging", disable=not self.runner.progress)
        rows = [self._row(method) for method in bar]
        plain = [row["key"] for row in rows if row["kind"] == "independent" and row["adapter"] is None]  # of those, the knee is the choice
        fitting = [row for row in rows if row["within"] and row["saved"]["all"] > 0 and row["key"] not in plain]
        best = max(fitting, key=lambda row: row["saved"]["all"], default=None)
        sharing = max((row for row in fitting if row["shares"]), key=lambda row: row["saved"]["all"], default=None)
        return {
            "solver": self.solver,
            "knee": self.knee.as_json(),
            "reference": self.reference.key,
            "reference_steps": self.reference.steps,
            "bars": {name: method.key for name, method in self.bars.items()},
            "methods": rows,
            "unavailable": [{"key": method.key, **_words(method), "why": why} for method, why in self.unavailable.items()],
            "recommended": best and best["key"],
            "recommended_sharing": sharing and sharing["key"],
        }

    def _row(self, method: Method) -> dict[str, Any]:
        cost, rival = self.cost[method], self._rival(method)
        metrics = {spec: self._metrics(method, rival, spec) for spec in self.judge.names}
        fits = self._fits(method)
        return {
            "key": method.key,
            **_words(method),
            "shares": method.shares,
            "shared_calls": cost["branch_calls"],
            "num_calls": cost["num_calls"],
            "pictures": cost["pictures"],
            "guidance_copies": cost["guidance_copies"],
            "nfe": cost["nfe"],
            "rows_per_picture": _rows_per_picture(cost),
            "blocks_computed": cost["computed"],
            "saved": self._saved(method),
            **self._seconds(method),
            "rival": rival and rival.key,
            "metrics": metrics,
            "within_each": fits,
            "within": all(fits.values()),
        }

    def _saved(self, method: Method) -> dict[str, float]:
        """Fractions of the reference's denoiser rows: over prompts with a neighbour, over all that were read; and of the rows of
        independent sampling at the method's own step count."""
        asked, cost, reference = self.asked, self.cost[method], _rows_per_picture(self.cost[self.reference])
        alone = self._alone(method)
        loners = sum(len(group) == 1 for group in asked.groups)
        grouped = (_rows_per_picture(cost) * len(asked.prompts) - alone * loners) / (len(asked.prompts) - loners)
        everyone = asked.grouped_share * grouped + (1 - asked.grouped_share) * alone
        steps = cost["num_calls"] * cost["guidance_copies"]
        return {"grouped": 1 - grouped / reference, "all": 1 - everyone / reference, "own_steps": 1 - grouped / steps}

    def _alone(self, method: Method) -> float:
        """Denoiser rows of a picture without a neighbour."""
        cost = self.cost[method]
        if not method.shares:
            return _rows_per_picture(cost)
        return cost["num_calls"] * cost["guidance_copies"]

    def _seconds(self, method: Method) -> dict[str, Any]:
        """Of denoising a picture, and of all that a picture takes, with the fraction that is saved of the reference's: over chunks that
        both drew in the same phase and run, without the first ones if there are others. The reference's are those of the methods."""
        phases = [row["phase"] for row in calls(self.folder, method)]
        phase = "methods" if method == self.reference and "methods" in phases else phases[0]
        for warm in (True, False):
            ours, theirs = (clocked(self.folder, one, phase, warm) for one in (method, self.reference))
            common = ours.keys() & theirs.keys()
            if common:
                break
        shown = common or clocked(self.folder, method, phase, warm=True).keys() or ours.keys()
        pictures = sum(ours[key]["pictures"] for key in shown)
        found: dict[str, Any] = {"phase": phase}
        for name in ("denoise_seconds", "seconds"):
            mine = sum(ours[key][name] for key in shown)
            base = sum(theirs[key][name] for key in common)
            found[f"{name}_per_picture"] = mine / pictures
            found[f"{name}_saved"] = 1 - mine / base if base else None
        return found

    def _rival(self, method: Method) -> Method | None:
        """Independent sampling with the same adapter and the nearest number of denoiser rows, the dearer of two that are as near; None
        where the nearest is far."""
        if method.kind in ("independent", "shared-noise"):
            return None
        rows = _rows_per_picture(self.cost[method])
        others = [other for other in self.methods if other.kind == "independent" and other.adapter == method.adapter]
        gap = lambda other: abs(_rows_per_picture(self.cost[other]) - rows)
        nearest = min(others, key=lambda other: (gap(other), -other.steps), default=None)
        return nearest if nearest is not None and gap(nearest) <= NEAR * rows else None

    def _own(self, method: Method) -> Method | None:
        """Independent sampling with the same steps and adapter: the same pictures without sharing."""
        own = Method("independent", method.steps, method.solver, None, method.adapter)
        return own if own in self.cost and own != method else None

    def _metrics(self, method: Method, rival: Method | None, spec: str) -> dict[str, Any]:
        """Metric → its interval, and its differences to the reference, the rival, the same without sharing, and what it is judged by."""
        measured, own, judging = self.judge.measure(method, spec), self._own(method), spec == self.judge.names[0]
        others = {"to_reference": self.reference, "to_rival": rival, "to_own": own}
        found = {}
        for metric, measurement in measured.items():
            compared = others | ({"to_bar": self.bars[metric]} if judging and metric in self.bars else {})
            found[metric] = {**measurement.estimate().as_json(), "up": measurement.up}
            for name, other in compared.items():
                if other is not None:
                    found[metric][name] = measurement.minus(self.judge.measure(other, spec)[metric]).as_json()
        if own is not None and judging:
            found["moved_pixels"] = self.judge.moved_pixels(method, own).estimate().as_json()
        if own is not None:
            found["moved"] = self.judge.moved(method, own, spec).estimate().as_json()
        return found

    def _fits(self, method: Method) -> dict[str, bool]:
        """Guarded metric → whether its whole difference to what it is judged against lies within the margin."""
        spec = self.judge.names[0]
        measured, fits = self.judge.measure(method, spec), {}
        for name, other in self.bars.items():
            best = self.judge.measure(other, spec)[name]
            fits[name] = within(measured[name].minus(best), best.estimate().value, bool(best.up), self.margin)
        return fits


def _order(method: Method) -> tuple:
    """Each adapter's methods together, independent sampling first; what is equal stays in its order."""
    alone = method.kind == "independent"
    return method.adapter.name if method.adapter else "", not alone, -method.steps if alone else 0


def _words(method: Method) -> dict[str, Any]:
    return {"label": method.label, "kind": method.kind, "steps": method.steps, "value": method.value,
            "adapter": method.adapter and method.adapter.name}


def _rows_per_picture(cost: Mapping[str, Any]) -> float:
    """Denoiser rows of a picture, guidance copies counted, and of a cached denoiser only the share of blocks that it computed."""
    return cost["nfe"] * cost["guidance_copies"] * (1.0 if cost["computed"] is None else cost["computed"]) / cost["pictures"]


def real_row(judge: Judge) -> dict[str, Any] | None:
    """The real pictures, measured as drawn ones are; None where they are not aligned with the prompts."""
    measured: dict[str, dict[str, Measurement] | None] = {spec: judge.real(spec) for spec in judge.names}
    if None in measured.values():
        return None
    return {spec: {name: {**one.estimate().as_json(), "up": one.up} for name, one in of.items()} for spec, of in measured.items()}


def smallness(pictures: int, groups: int) -> str | None:
    """A sentence where there is too little to claim anything; None where there is not."""
    if groups >= FEW_GROUPS and pictures >= FEW_PICTURES:
        return None
    return (f"Only {pictures} pictures of {groups} groups: too few for claims. Take {FEW_GROUPS} groups and {FEW_PICTURES} pictures at the "
            "least; the intervals show how little is known.")


def sentence(solver: dict[str, Any], margin: float, metrics: Iterable[str]) -> str:
    """The verdict on one solver in words."""
    rows = {row["key"]: row for row in solver["methods"]}
    base = f"{solver['solver']}: independent sampling at {solver['reference_steps']} steps is the reference"
    knee = "its knee" if solver["knee"]["steps"] is not None else "no step count is within the margin of all bests, so the largest is"
    good = f"{bar(metrics, margin)}, intervals included"
    best = rows.get(solver["recommended"])
    if best is None:
        return f"{base} ({knee}). Of the methods that cost less, none has {good}: recommended default: none."
    saved = best["saved"]
    text = (f"{base} ({knee}). Recommended default: {name_of(best)}, which saves {saved['grouped']:.1%} of the denoiser rows of prompts "
            f"with a neighbour and {saved['all']:.1%} over all prompts, with {good}.")
    sharing = rows.get(solver["recommended_sharing"])
    if best["shares"]:
        return text
    if sharing is None:
        return f"{text} No way of sharing does as well."
    return f"{text} Of the ways of sharing, {name_of(sharing)} does as well, and saves {sharing['saved']['all']:.1%} over all prompts."


def bar(metrics: Iterable[str], margin: float) -> str:
    """What a method must have to count as equally good."""
    best = [name for name in metrics if name != "diversity"]
    return (f"{words(best)} within {margin:.0%} of the best that independent sampling has, and diversity within {margin:.0%} of the "
            "reference's")


def words(metrics: Iterable[str]) -> str:
    """Metrics in a sentence: "identification, Fréchet distance and diversity"."""
    names = [{"score": "picture–caption score", "frechet": "Fréchet distance"}.get(name, name) for name in metrics]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def name_of(row: Mapping[str, Any]) -> str:
    """A method with its steps and adapter."""
    adapter = f", {row['adapter']}" if row["adapter"] else ""
    return f"{row['label']} at {row['steps']} steps{adapter}"
