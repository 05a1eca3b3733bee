"""results.json as a picture: what a row buys, by every way to spend fewer of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["plot"]

PANELS = (("identification", "Does the picture show its own prompt?", "fraction nearest to their own of the group's prompts"),
          ("frechet", "How far from real pictures?", "distance to real pictures"),
          ("diversity", "Do a group's pictures differ?", "mean distance within a group"))
CURVES = {
    "independent": ("fewer steps", "#374151", "o"),
    "share": ("flat sharing", "#dc2626", "s"),
    "tree": ("tree", "#2563eb", "^"),
    "step-back": ("a step back", "#d97706", "D"),
    "cache": ("cache", "#7c3aed", "v"),
    "shared-noise": ("shared noise", "#059669", "P"),
}
REAL = "#9ca3af"
LINE = 11  # height of a name [points]


class Label(NamedTuple):
    """The name of a curve, and the point that it belongs to."""

    x: float
    y: float
    text: str
    colour: str


def plot(results: Mapping[str, Any], file: Any) -> None:
    """Rows per picture against each metric with intervals: a row of panels for every solver and adapter.

    Args:
        results: what results.json holds.
        file: a .png, or what its bytes are written to.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    spec = next(iter(results["metrics"]))
    panels = [panel for panel in PANELS if panel[0] in results["metrics"][spec]]
    lanes = [(solver, adapter) for solver in results["solvers"] for adapter in _adapters(solver)]
    figure = Figure(figsize=(5.6 * len(panels) + 0.4, 4.4 * len(lanes) + 1.1), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(lanes), len(panels), squeeze=False)
    labels: list[tuple[Any, list[Label]]] = []
    for line, (solver, adapter) in zip(axes, lanes):
        for ax, (metric, question, unit) in zip(line, panels):
            of = f"{solver['solver']}, {adapter}" if adapter else solver["solver"]
            ax.set_title(f"{question}\n({of})" if len(lanes) > 1 else question, fontsize=11, loc="left", parse_math=False)
            ax.set_ylabel(unit if metric != "frechet" else results["metrics"][spec]["frechet"], fontsize=9, parse_math=False)
            labels.append((ax, _panel(ax, results, solver, adapter, spec, metric)))
    asked = results["prompts"]
    figure.suptitle(f"Quality by cost: {asked['pictures']} pictures per method, {asked['groups']} groups of similar prompts, "
                    f"{results['settings']['model']}\nbars: 95 % intervals{_smallness(results)}", fontsize=12, parse_math=False)
    figure.draw_without_rendering()  # settles where everything is
    for ax, of_ax in labels:
        _write_labels(ax, of_ax)
    figure.savefig(file, format="png")


def _adapters(solver: Mapping[str, Any]) -> list[str | None]:
    return list(dict.fromkeys(row["adapter"] for row in solver["methods"]))


def _smallness(results: Mapping[str, Any]) -> str:
    return "; too few pictures for claims" if results["small"] else ""


def _panel(ax: Any, results: Mapping[str, Any], solver: Mapping[str, Any], adapter: str | None, spec: str, metric: str) -> list[Label]:
    """One metric over cost. Returns the names of its curves, still to be written."""
    rows = [row for row in solver["methods"] if row["adapter"] == adapter and metric in row["metrics"][spec]]
    reference = next(row for row in solver["methods"] if row["key"] == solver["reference"])
    ax.set_xscale("log")
    _band(ax, results, spec, metric)
    if metric == "identification":
        _chance(ax, results["prompts"]["chance"])
    labels = []
    for kind, (label, colour, marker) in CURVES.items():
        for steps, points in _by_steps([row for row in rows if row["kind"] == kind], kind):
            other = steps not in (None, solver["reference_steps"])
            _curve(ax, points, spec, metric, colour, marker, 0.45 if other else 1.0)
            end = min(points, key=lambda row: row["rows_per_picture"])
            value = end["metrics"][spec][metric]["value"]
            labels.append(Label(end["rows_per_picture"], value, f"{label}, {steps} steps" if other else label, colour))
    _mark_reference(ax, solver, reference, reference["metrics"][spec][metric]["value"])
    _ticks(ax, rows, reference["guidance_copies"])
    _better(ax, metric != "frechet")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, linewidth=0.6)
    return labels


def _mark_reference(ax: Any, solver: Mapping[str, Any], reference: Mapping[str, Any], value: float) -> None:
    """A ring and a line at what savings are measured from."""
    at = reference["rows_per_picture"]
    ax.axvline(at, color="#111827", linewidth=0.8, linestyle=":")
    ax.plot(at, value, "o", markersize=12, markerfacecolor="none", markeredgecolor="#111827")
    knee = "knee" if solver["knee"]["steps"] is not None else "no knee; largest"
    costs = [row["rows_per_picture"] for row in solver["methods"]]
    left = at**2 > min(costs) * max(costs)  # there is more room
    ax.annotate(f"{knee}: {solver['reference_steps']} steps", (at, 1), xycoords=("data", "axes fraction"), xytext=(-3 if left else 3, -10),
                textcoords="offset points", fontsize=8, color="#111827", ha="right" if left else "left")


def _ticks(ax: Any, rows: Sequence[Mapping[str, Any]], copies: int) -> None:
    """Ticks at the costs of independent sampling, as far as they do not touch; room at the left for names."""
    from matplotlib.ticker import FixedLocator, NullLocator

    costs = sorted(row["rows_per_picture"] for row in rows)
    ax.set_xlim(costs[0] / 2, costs[-1] * 1.15)
    ticks: list[float] = []
    for cost in sorted((row["rows_per_picture"] for row in rows if row["kind"] == "independent"), reverse=True):
        if not ticks or cost < ticks[-1] / 1.17:
            ticks.append(cost)
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_xlabel(f"denoiser rows per picture{f' ({copies} per call, with guidance)' if copies > 1 else ''}", fontsize=9)


def _by_steps(rows: Sequence[Mapping[str, Any]], kind: str) -> list[tuple[int | None, list]]:
    """Points that make a curve: fewer steps are one, the others one for each step count."""
    if kind == "independent":
        return [(None, list(rows))] if rows else []
    counts = dict.fromkeys(row["steps"] for row in rows)
    return [(steps, [row for row in rows if row["steps"] == steps]) for steps in counts]


def _curve(ax: Any, points: Sequence[Mapping[str, Any]], spec: str, metric: str, colour: str, marker: str, alpha: float) -> None:
    points = sorted(points, key=lambda row: row["rows_per_picture"])
    figures = [row["metrics"][spec][metric] for row in points]
    errors = [[max(f["value"] - f["low"], 0) for f in figures], [max(f["high"] - f["value"], 0) for f in figures]]
    ax.errorbar([row["rows_per_picture"] for row in points], [f["value"] for f in figures], yerr=errors, color=colour, marker=marker,
                markersize=5, linewidth=1.5, elinewidth=0.9, capsize=2, alpha=alpha)


def _write_labels(ax: Any, labels: Sequence[Label]) -> None:
    """Each name below and left of its curve's cheapest point, moved down until no two are in one place."""
    scale = 72 / ax.figure.dpi  # points of a pixel
    ends = [ax.transData.transform((label.x, label.y)) * scale for label in labels]
    written: list[tuple[float, float, float]] = []  # left, right, bottom [points]
    for (x, y), label in sorted(zip(ends, labels), key=lambda pair: -pair[0][1]):
        width, bottom = 5.2 * len(label.text), y - 20
        left = x - 10 - width
        while any(left < right and other < left + width and abs(bottom - low) < LINE for other, right, low in written):
            bottom -= 1
        written.append((left, left + width, bottom))
        ax.annotate(label.text, (label.x, label.y), xytext=(-10, bottom - y), textcoords="offset points", fontsize=8.5, color=label.colour,
                    ha="right", va="bottom", weight="bold", parse_math=False,
                    bbox={"facecolor": "white", "alpha": 0.6, "edgecolor": "none", "pad": 0.5},
                    arrowprops={"arrowstyle": "-", "color": label.colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3})


def _band(ax: Any, results: Mapping[str, Any], spec: str, metric: str) -> None:
    """Where real pictures are; for a distance, only at the sizes that methods are compared at."""
    real = (results["real"] or {}).get(spec, {}).get(metric)
    if not real:
        return
    ax.axhspan(real["low"], real["high"], color=REAL, alpha=0.3, linewidth=0)
    text = "real pictures from real ones" if metric == "frechet" else "real pictures"
    ax.annotate(text, (0.99, real["value"]), xycoords=("axes fraction", "data"), ha="right", va="center", fontsize=8, color="#4b5563")


def _chance(ax: Any, value: float) -> None:
    """What guessing would have."""
    ax.axhline(value, color=REAL, linewidth=0.9, linestyle="--")
    ax.annotate("guessing", (0.99, value), xycoords=("axes fraction", "data"), xytext=(0, 2), textcoords="offset points", ha="right",
                va="bottom", fontsize=8, color="#4b5563")


def _better(ax: Any, up: bool) -> None:
    tail, head = ((0.025, 0.78), (0.025, 0.97)) if up else ((0.025, 0.22), (0.025, 0.03))
    ax.annotate("", head, xytext=tail, xycoords="axes fraction", arrowprops={"arrowstyle": "->", "color": "#6b7280"})
    ax.annotate("better", tail, xycoords="axes fraction", ha="center", va="top" if up else "bottom", fontsize=8, color="#6b7280",
                rotation=90)

