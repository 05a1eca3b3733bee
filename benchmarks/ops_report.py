"""Tables and the plot of bench_ops.py, made from its JSON."""

import numpy as np
from readme_tables import markdown_table

LARGE_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}  # calls that cannot live in a cache
COLOURS = {"cpu": "#0072b2", "cuda": "#0072b2", "triton": "#009e73", "diffusers": "#d55e00", "torch.compile": "#cc79a7"}
MARKERS = {"cpu": "o", "cuda": "o", "triton": "s", "diffusers": "v", "torch.compile": "^"}


def tables(result):
    """{"table": times faster than diffusers, "tables": {"compile", "large", "threads"}}: see readme_tables.py."""
    more = {"compile": times_faster(result, "torch.compile"), "large": large(result), "threads": threads(result)}
    return {"table": times_faster(result, "diffusers"), "tables": {name: table for name, table in more.items() if table["rows"]}}


def times_faster(result, rival):
    """Solver by size and dtype: how many times faster our first backend is, at one row without a branch."""
    lines = [line for line in result["lines"] if line["rows"] == 1 and line["fan_out"] == 1 and line["dtype"] != "bf16/fp32"]
    columns = [(size, dtype) for size in _distinct(lines, "size") for dtype in _distinct(lines, "dtype")]
    ratios = {(r["solver"], r["size"], r["dtype"]): r["ratio"][result["backends"][0]][rival]["median"] for r in lines}
    return {
        "columns": [f"times faster than {rival}", *(f"{size} {dtype}" for size, dtype in columns)],
        "rows": [[solver, *(ratios.get((solver, *c)) for c in columns)] for solver in _distinct(lines, "solver")],
        "formats": [None, *[".1f"] * len(columns)],
    }


def large(result):
    """Calls too large for any cache: times faster, and everyone's share of copy bandwidth."""
    kind = "cpu" if result["environment"]["device"] == "cpu" else "cuda"
    lines = [line for line in result["lines"] if line["bytes"] >= LARGE_BYTES[kind]]
    names = [*result["backends"], "torch.compile", "diffusers"]
    rows = [
        [r["solver"], r["dtype"], r["size"], f"{r['rows']}→{r['rows_out']}", r["bytes"] / 2**20, *(r["of_copy"][n] for n in names)]
        for r in lines
    ]
    columns = ["solver", "model/state", "size", "rows", "MB", *(f"{name}, of copy" for name in names)]
    return {"columns": columns, "rows": rows, "formats": [None] * 4 + [",.0f"] + [".0%"] * len(names)}


def threads(result):
    """Everyone on large latents with one thread count and the next."""
    rows = [
        [f"{r['rows']} {r['size']}", r["dtype"], r["contender"], *(t["median"] for t in r["us"].values()),
         *(t["median"] for t in r["times_faster"].values())]
        for r in result["threads"]
    ]  # fmt: skip
    counts = result["settings"]["threads"]
    timed, gained = [f"us, {n} thread{'s' * (n > 1)}" for n in counts], [f"gain of {n}" for n in counts[1:]]
    columns = ["latents", "model/state", "contender", *timed, *gained]
    return {"columns": columns, "rows": rows, "formats": [None] * 3 + [",.0f"] * len(counts) + [".2f"] * (len(counts) - 1)}


def text(result):
    """What the terminal shows."""
    parts = [_detail(result), *(markdown_table(**table) for table in (result["table"], *result["tables"].values()) if table["rows"])]
    parts.append(f"bytes  {result['bytes']}")
    parts.append("one element  " + ", ".join(f"{name} {t['median']:.1f} us" for name, t in result["overhead_us"].items()))
    for name in ("beyond_the_limit", "left_for_later", "refused"):
        if result[name]:
            some = "; ".join(result[name][:8]) + " ..." * (len(result[name]) > 8)
            parts.append(f"{name.replace('_', ' ')}: {len(result[name])} cases: {some}")
    return "\n\n".join([*parts, f"{len(result['lines'])} cases, {result['wall_seconds']:.0f} s"])


def _detail(result):
    rivals = ("diffusers", "torch.compile")
    columns = ["op", "backend", "model/state", "R_in→R_out", "size", *(f"{rival} us" for rival in rivals), "copy us"]
    columns += ["ours us", "p20–p80", *(f"× {rival}" for rival in rivals), "GB/s", "of copy", "call us", "host"]
    rows = []
    for r in result["lines"]:
        for name in result["backends"]:
            ours, call = r["us"][name], r.get("call_us", {}).get(name)
            rows.append(
                [r["solver"], name, r["dtype"], f"{r['rows']}→{r['rows_out']}", r["size"]]
                + [r["us"][other]["median"] for other in (*rivals, "copy")]
                + [ours["median"], f"{ours['p20']:.4g}–{ours['p80']:.4g}", *(r["ratio"][name][rival]["median"] for rival in rivals)]
                + [r["gigabytes_per_second"][name], r["of_copy"][name], call and call["median"]]
                + [", ".join(r.get("host_bound", ())) or None]
            )
    return markdown_table(columns, rows, [None] * 5 + [".1f"] * 4 + [None] + [".2f"] * 2 + [".1f", ".0%", ".1f", None])


def plot(result, path):
    """Share of copy bandwidth against bytes moved: a point per case, a line through the median of each octave of bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.4), layout="constrained")
    names = [*result["backends"], "torch.compile", "diffusers"]
    ends = []
    for name in names:
        moved = np.array([line["bytes"] for line in result["lines"]])
        share = np.array([100 * line["of_copy"][name] for line in result["lines"]])
        octave = np.round(np.log2(moved))
        x, y = np.array([(np.median(moved[octave == o]), np.median(share[octave == o])) for o in np.unique(octave)]).T
        style = {"color": COLOURS[name], "marker": MARKERS[name]}
        axes.plot(moved, share, linestyle="none", alpha=0.25, markersize=4, markeredgewidth=0, **style)
        axes.plot(x, y, linewidth=2.5, markersize=6, label=_display(name), **style)
        ends.append((y[-1], x[-1], name))
    axes.axhline(100, color="black", linewidth=1.2, linestyle="--")
    axes.annotate("plain copy of as many bytes", (0.01, 100), xycoords=("axes fraction", "data"), xytext=(0, 4), textcoords="offset points")
    _label_ends(axes, ends)
    axes.set(xscale="log", ylabel="share of copy bandwidth [%]")
    axes.set_xlabel("bytes that one call must move (a point per case, lines through the medians)")
    axes.set_ylim(0, max(110, axes.get_ylim()[1]))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 2**20:.3g} MB")
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(base=4, numticks=12))
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set_title(f"Guidance, solver step, branch and next model input in one call\n{_where(result)}: higher is better", loc="left")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _label_ends(axes, ends):
    """Names to the right of the lines' last points, at least six percent apart."""
    height = None
    for y, x, name in sorted(ends):
        height = y if height is None else max(y, height + 6)
        axes.annotate(_display(name), (x, y), xytext=(1.015, height), textcoords=axes.get_yaxis_transform(), va="center",
                      color=COLOURS[name], fontweight="bold", annotation_clip=False)  # fmt: skip


def _display(name):
    return name if name in ("diffusers", "torch.compile") else f"ours, {name}"


def _where(result):
    ran = result["environment"]
    if ran["device"] != "cpu":
        return f"{ran['device']}, cold L2, device time"
    threads = "one thread" if ran["threads"] == 1 else f"{ran['threads']} threads"
    return f"{threads} of an {ran['processor']}, warm caches"


def _distinct(lines, name):
    return list(dict.fromkeys(line[name] for line in lines))
