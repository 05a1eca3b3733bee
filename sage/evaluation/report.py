"""results.json as text: table.md with every figure, and the short table of the terminal. Nothing else is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sage.evaluation.results import bar, name_of, sentence

__all__ = ["short_table", "table"]

ORDER = ("identification", "score", "frechet", "kernel", "diversity", "vendi", "moved", "moved_pixels")
ARROW = {True: " ↑", False: " ↓", None: ""}
DIGITS = {"identification": 3, "score": 2, "frechet": 3, "kernel": 4, "diversity": 3, "vendi": 3, "moved": 2, "moved_pixels": 1}
COMPARISONS = {"to_bar": "to what “within” goes by: the best of independent sampling, for diversity the reference",
               "to_reference": "to the reference", "to_rival": "to fewer steps at equal rows, up to a tenth",
               "to_own": "to the same without sharing"}


def table(results: Mapping[str, Any]) -> str:
    """The whole report as Markdown."""
    parts = [f"# What sharing costs in quality: {results['settings']['model']}", _verdict(results), _about(results)]
    for solver in results["solvers"]:
        parts += [f"## Solver {solver['solver']}", _knee(solver, results["settings"]["margin"]), _costs(solver)]
        for number, spec in enumerate(results["metrics"]):
            parts += [_quality(results, solver, spec, guarded=number == 0), _floor(results, spec)]
            parts += [f"{text}:\n\n{_differences(results, solver, spec, name)}" for name, text in COMPARISONS.items()
                      if _columns(solver, spec, name)]
    if results["remarks"]:
        parts.append("## Remarks\n\n" + "\n".join(f"- {_cell(remark)}" for remark in results["remarks"]))
    parts.append(f"Made by `{_cell(results['command'])}` on {results['machine']['summary']}.")
    return "\n\n".join(part for part in parts if part) + "\n"


def short_table(results: Mapping[str, Any]) -> str:
    """Cost and judged quality in aligned columns, and the verdicts."""
    spec = next(iter(results["metrics"]))
    names = [name for name in ("identification", "score", "frechet", "diversity") if name in results["metrics"][spec]]
    lines = []
    for solver in results["solvers"]:
        head = ["", "rows/picture", "saved", "of all", *(f"{name}{ARROW[name != 'frechet']}" for name in names), "margin"]
        rows = [head]
        for row in solver["methods"]:
            figures = [_interval(row["metrics"][spec][name], DIGITS[name]) for name in names]
            rows.append([_marked(row, solver), f"{row['rows_per_picture']:.1f}", _percent(row["saved"]["grouped"]),
                         _percent(row["saved"]["all"]), *figures, "within" if row["within"] else "outside"])
        rows += [[f"{row['label']}", *["–"] * (len(head) - 2), row["why"][:60]] for row in solver["unavailable"]]
        if results["real"]:
            real = results["real"][spec]
            rows.append(["real pictures", "–", "–", "–", *(_interval(real[n], DIGITS[n]) if n in real else "–" for n in names), "–"])
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        lines += [solver["solver"], *("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows), ""]
    return "\n".join([*lines, _verdict(results)])


def _verdict(results: Mapping[str, Any]) -> str:
    said = [sentence(solver, results["settings"]["margin"], results["guarded"]) for solver in results["solvers"]]
    return "\n".join([*said, *([results["small"]] if results["small"] else [])])


def _about(results: Mapping[str, Any]) -> str:
    asked = results["prompts"]
    copies = results["solvers"][0]["methods"][0]["guidance_copies"]
    guidance = f"guidance takes {copies} rows of each call, and they are counted" if copies > 1 else "no guidance doubles the rows"
    lines = [
        f"{asked['evaluated']} prompts in {asked['groups']} groups (of {asked['read']} prompts that were read, {asked['grouped']} have a "
        f"neighbour at similarity {asked['similarity']:g}), {asked['images_per_prompt']} pictures each: {asked['pictures']} pictures by "
        f"every method, all with the same seeds (base seed {results['settings']['seed']}).",
        "Identification: the fraction of pictures that are nearer to their own prompt than to every other of their group; guessing has "
        f"{asked['chance']:.3f}.",
        f"Cost is denoiser rows; {guidance}. “Saved” is measured from independent sampling at the knee, over prompts with a neighbour "
        "and over all prompts that were read.",
        f"Brackets are 95 % bootstrap intervals that resample whole groups, {_resamples(results)}; differences are paired by prompt and "
        "seed. Intervals are not corrected for the number of comparisons.",
        f"“Within”: {bar(results['guarded'], results['settings']['margin'])}, whole intervals of the differences included. "
        "But for diversity, this is the bar that the knee itself had to pass. Step counts below it are never recommended.",
        f"Seconds are of {'; '.join(dict.fromkeys(run['machine'] for run in results['runs']))}, and comparable within this table only; "
        "methods were drawn in turns, a few groups at a time, and each one's first turn does not count where there are more. Time saved is "
        "of the reference's in the same turns; step counts that were drawn to find the knee were drawn before all others.",
        "A rival of equal rows is independent sampling whose rows differ by a tenth at the most; “–”: there is none, or none is asked for.",
    ]
    if results["references"]:
        lines.append(_about_references(results))
    if len(results["runs"]) > 1:
        lines.append(f"Drawn in {len(results['runs'])} runs.")
    return "\n".join(f"- {line}" for line in lines)


def _resamples(results: Mapping[str, Any]) -> str:
    counts = results["resamples"]
    others = "; for extractors that do not judge it has none" if len(results["metrics"]) > 1 else ""
    frechet = f" (the Fréchet distance {counts['frechet']} times{others})" if results["references"] else ""
    rough = ": a quick run, whose ends are rough" if results["settings"]["quick"] else ""
    return f"{counts['means']} times{frechet}{rough}"


def _about_references(results: Mapping[str, Any]) -> str:
    of, asked = results["references"], results["prompts"]
    left_out = asked["groups"] - of["groups"]
    text = f"Distances are to {of['name']} ({of['pictures']} different ones)."
    if results["real"] and left_out > 0:
        text += f" The row of real pictures leaves out {left_out} groups in which one picture belongs to several prompts."
    return text


def _knee(solver: Mapping[str, Any], margin: float) -> str:
    """The knee's own table: differences to each metric's best."""
    knee, names = solver["knee"], list(solver["knee"]["best"])
    found = f"{knee['steps']} steps" if knee["steps"] is not None else "none: no step count is within the margin of every best"
    text = f"Knee, the least steps at which every metric is within {margin:.0%} of its best, interval included: **{found}**."
    rows = [[steps, *(f"{_interval(of[name]['to_best'], DIGITS[name], signed=True)}{'' if of[name]['within'] else ' ✗'}" for name in names)]
            for steps, of in sorted(knee["table"].items(), key=lambda item: -int(item[0]))]
    head = ["steps", *(f"{name} − best (at {knee['best'][name]})" for name in names)]
    return f"{text}\n\n{_markdown(head, rows)}"


def _costs(solver: Mapping[str, Any]) -> str:
    head = ["method", "calls shared", "rows per picture", "rows saved", "over all prompts", "of own steps", "denoising, s per picture",
            "time saved, denoising", "time saved, whole", "rival of equal rows", "within"]
    labels = {row["key"]: name_of(row) for row in solver["methods"]}
    rows = []
    for row in solver["methods"]:
        saved = row["saved"]
        rows.append([_marked(row, solver), _calls(row), f"{row['rows_per_picture']:.2f}", _percent(saved["grouped"]),
                     _percent(saved["all"]), _percent(saved["own_steps"]), f"{row['denoise_seconds_per_picture']:.3f}",
                     _percent(row["denoise_seconds_saved"]),
                     _percent(row["seconds_saved"]), labels.get(row["rival"], "–"), "yes" if row["within"] else "no"])
    rows += [[row["label"], row["why"], *["–"] * (len(head) - 2)] for row in solver["unavailable"]]
    return _markdown(head, rows)


def _quality(results: Mapping[str, Any], solver: Mapping[str, Any], spec: str, guarded: bool) -> str:
    titles, names = results["metrics"][spec], _columns(solver, spec)
    rows = []
    for row in solver["methods"]:
        figures = row["metrics"][spec]
        marks = row["within_each"] if guarded else {}
        rows.append([_marked(row, solver), *(f"{_interval(figures.get(name), DIGITS[name])}{'' if marks.get(name, True) else ' ✗'}"
                                             for name in names)])
    if results["real"]:
        real = results["real"][spec]
        rows.append(["real pictures", *(_interval(real.get(name), DIGITS[name]) for name in names)])
    figures = solver["methods"][0]["metrics"][spec]
    head = [f"{_title(titles, name)}{ARROW[figures.get(name, {}).get('up')]}" for name in names]
    return _markdown(["method", *head], rows) + ("\n\n✗: not within the margin." if guarded else "")


def _floor(results: Mapping[str, Any], spec: str) -> str:
    floor = results["floor"].get(spec)
    if not floor:
        return ""
    of = [f"{results['metrics'][spec][name]} {figure['value']:.{DIGITS[name]}f}" for name, figure in floor.items()]
    text = f"Real pictures against real pictures ({floor['frechet']['what']}): {', '.join(of)}."
    if not floor["frechet"]["comparable"]:
        text += (f" Methods are compared at other numbers, {results['prompts']['pictures']} pictures to "
                 f"{results['references']['pictures']}, with which Fréchet distances fall: no bound for them.")
    return text


def _differences(results: Mapping[str, Any], solver: Mapping[str, Any], spec: str, comparison: str) -> str:
    names = _columns(solver, spec, comparison)
    rows = [[_marked(row, solver), *(_interval(row["metrics"][spec].get(name, {}).get(comparison), DIGITS[name], signed=True)
                                     for name in names)]
            for row in solver["methods"] if any(comparison in row["metrics"][spec].get(name, {}) for name in names)]
    return _markdown(["difference", *(_title(results["metrics"][spec], name) for name in names)], rows)


def _columns(solver: Mapping[str, Any], spec: str, comparison: str | None = None) -> list[str]:
    """Metrics that some method has, and has in a comparison."""
    there = [row["metrics"][spec] for row in solver["methods"]]
    return [name for name in ORDER if any(name in of and (comparison is None or comparison in of[name]) for of in there)]


def _title(titles: Mapping[str, str], name: str) -> str:
    return "pixels moved (rms of 255)" if name == "moved_pixels" else titles[name]


def _marked(row: Mapping[str, Any], solver: Mapping[str, Any]) -> str:
    marks = {solver["reference"]: " (reference)", solver["recommended"]: " (recommended)"}
    return name_of(row) + marks.get(row["key"], "")


def _calls(row: Mapping[str, Any]) -> str:
    """Calls before a picture runs alone, of all calls; a range where they differ."""
    low, high = min(row["shared_calls"]), max(row["shared_calls"])
    return f"{low if low == high else f'{low}–{high}'} of {row['num_calls']}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _interval(estimate: Mapping[str, float] | None, digits: int, signed: bool = False) -> str:
    if estimate is None:
        return "–"
    sign = "+" if signed else ""
    value, *ends = (f"{estimate[name]:{sign}.{digits}f}" for name in ("value", "low", "high") if estimate[name] is not None)
    return f"{value} [{', '.join(ends)}]" if ends else value


def _markdown(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(_cell(str(cell)) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
