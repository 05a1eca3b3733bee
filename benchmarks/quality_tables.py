"""The tables of docs/quality.md, made of what bench_quality.py collected and nothing else."""

import math
import re

METRICS = ("identification", "score", "frechet", "kernel", "diversity", "vendi")
TITLES = {"identification": "identification ↑", "score": "score ↑", "frechet": "Fréchet ↓", "kernel": "kernel ↓", "diversity": "diversity ↑",
          "vendi": "Vendi ↑"}
DIGITS = {"identification": 3, "score": 1, "frechet": 2, "kernel": 3, "diversity": 2, "vendi": 2}


def tables(evaluations: list[dict], log_snr: dict[tuple[str, int], list[float]]) -> dict[str, dict]:
    """Name → table, as benchmarks/readme_tables.py takes them.

    Args:
        evaluations: one for each solver.
        log_snr: (solver, steps) → log signal-to-noise ratio at each denoiser call.
    """
    found = {"choice": _choice(evaluations), "real": _real(evaluations[0])}
    for told in evaluations:
        name = re.sub("[^a-z0-9]", "", told["settings"]["solver"][0].replace("+", "p"))
        found[name] = _methods(told)
        found[f"{name}-rival"] = _rivals(told)
    return found | {"sweep": _sweep(evaluations, log_snr)}


def _choice(evaluations: list[dict]) -> dict:
    """What the rule takes: the largest saving whose whole interval stays within the margin."""
    columns = ["solver", "knee [steps]", "largest saving within the margin", "rows saved", "of all prompts", "largest by sharing",
               "rows saved by sharing", "of all prompts by sharing"]
    rows = []
    for told in evaluations:
        by_key = {row["key"]: row for row in told["methods"]}
        line = [told["solver"], str(told["knee"]["steps"] or f"none; {told['reference_steps']} is the reference")]
        for name in ("recommended", "recommended_sharing"):
            row = by_key.get(told[name])
            line += [_name(row), row["saved"]["grouped"], row["saved"]["all"]] if row else ["none", None, None]
        rows.append(line)
    return {"columns": columns, "rows": rows, "formats": [None, None, None, ".1%", ".1%", None, ".1%", ".1%"]}


def _real(told: dict) -> dict:
    """Real pictures, and how far two sets of them are from each other."""
    cells = [_cell(told["real"].get(name, told["floor"].get(name)), name) for name in METRICS]
    return {"columns": ["", *(TITLES[name] for name in METRICS)], "rows": [["real pictures", *cells]]}


def _methods(told: dict) -> dict:
    """Cost and quality of every method of a solver."""
    columns = ["method", "rows a picture", "rows saved", "of all prompts", "time saved", *(TITLES[name] for name in METRICS), "within"]
    rows = []
    for row in told["methods"]:
        mark = " (reference)" if row["key"] == told["reference"] else ""
        cells = [_cell(row["metrics"].get(name), name, row["within_each"].get(name, True)) for name in METRICS]
        rows.append([_name(row) + mark, row["rows_per_picture"], row["saved"]["grouped"], row["saved"]["all"], row["denoise_seconds_saved"],
                     *cells, "yes" if row["within"] else "no"])
    return {"columns": columns, "rows": rows, "formats": [None, ".1f", ".1%", ".1%", ".1%", *[None] * (len(METRICS) + 1)]}


def _rivals(told: dict) -> dict:
    """Sharing at the knee less independent sampling with the nearest number of rows."""
    by_key = {row["key"]: row for row in told["methods"]}
    names = ("identification", "score", "frechet", "diversity")
    rows = []
    for row in told["methods"]:
        if row["shares"] and row["rival"] and row["steps"] == told["reference_steps"]:
            rival = by_key[row["rival"]]
            rows.append([_name(row), row["rows_per_picture"], _name(rival), rival["rows_per_picture"],
                         *(_cell(row["metrics"][name]["to_rival"], name, signed=True) for name in names)])
    return {"columns": ["sharing", "rows a picture", "fewer steps", "their rows a picture", *(TITLES[name] for name in names)], "rows": rows,
            "formats": [None, ".1f", None, ".1f", *[None] * len(names)]}


def _sweep(evaluations: list[dict], log_snr: dict[tuple[str, int], list[float]]) -> dict:
    """Flat sharing less the same pictures without sharing, by the noise level at which they part."""
    names = ("identification", "score", "frechet", "diversity")
    columns = ["solver and steps", "share", "calls shared", "log SNR at the branch", "share under a cosine schedule",
               *(TITLES[name] for name in names)]
    rows = []
    for told in evaluations:
        for row in told["methods"]:
            if row["kind"] != "share" or row["adapter"]:
                continue
            call = max(row["shared_calls"])
            level = log_snr[told["solver"], row["steps"]][call]
            rows.append([f"{told['solver']}, {row['steps']}", row["value"], f"{call} of {row['num_calls']}", level, cosine_share(level),
                         *(_cell(row["metrics"][name].get("to_own"), name, signed=True) for name in names)])
    return {"columns": columns, "rows": rows, "formats": [None, None, None, "+.2f", ".0%", *[None] * len(names)]}


def cosine_share(log_snr: float) -> float:
    """The fraction of a cosine schedule (arXiv:2102.09672, eq. 17, without its offset) that lies above a noise level: log SNR there is
    2 log cot(π t / 2) at time t in (0, 1), and steps that are even in time have taken 1 − t of it."""
    return 1 - 2 / math.pi * math.atan(math.exp(-log_snr / 2))


def _name(row: dict) -> str:
    adapter = f", {row['adapter']}" if row["adapter"] else ""
    return f"{row['label']}, {row['steps']} steps{adapter}"


def _cell(estimate: dict | None, name: str, within: bool = True, signed: bool = False) -> str | None:
    if estimate is None:
        return None
    form = f"{'+' if signed else ''}.{DIGITS[name]}f"
    value, *ends = (format(estimate[key], form) for key in ("value", "low", "high") if key in estimate)
    return f"{value}{f' [{ends[0]}, {ends[1]}]' if ends else ''}{'' if within else ' ✗'}"
