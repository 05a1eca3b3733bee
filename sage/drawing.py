"""Sharing plans for the eye: as text, and as a picture of which rows are evaluated at which denoiser call."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

from sage.plan import Node, SharingPlan
from sage.plan_checks import integer

COLOURS = ("#1f77b4", "#d95f02", "#2ca02c", "#9467bd", "#c0392b", "#8c564b", "#d6589f", "#7f8f1c", "#128c9e")
ALONE = "#6b7280"
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # they would steer a terminal


def describe(plan: SharingPlan, num_calls: int = 20, max_groups: int | None = None) -> str:
    """The plan as text; `max_groups` limits the groups (and the images alone) that are listed."""
    groups = [root for root in plan.roots if len(root.members) > 1]
    alone = [root for root in plan.roots if len(root.members) == 1]
    limit = max(len(plan.roots), 1) if max_groups is None else integer(max_groups, "describe: max_groups", 0)
    spans = {id(node): (first, end) for first, end, node in plan.intervals(num_calls)}
    names = leaf_names(plan, 100)
    lines = [_heading(plan)]
    for number, root in enumerate(groups[:limit], 1):
        lines += ["", f"group {number}, {len(root.members)} images: {_when(root, spans, num_calls)}"]
        lines += branches(root, names, spans, num_calls, "  ")
    if len(groups) > limit:
        lines += ["", f"… and {len(groups) - limit} more groups"]
    if alone:
        lines += ["", f"alone, {_count(len(alone), 'image')}:"]
        lines += [f"    {names[root.members[0]]}" for root in alone[:limit]]
    if len(alone) > limit:
        lines += [f"    … and {len(alone) - limit} more"]
    marks = "  (* gives the noise of the shared part)" if groups else ""
    rows = plan.resolve(num_calls).rows
    cost = plan.cost(num_calls)
    lines += ["", f"{_count(num_calls, 'call')}: {rows[0]} rows at the first, {rows[-1]} at the last{marks}"]
    lines.append(f"denoiser rows (nfe): {cost.nfe} instead of {cost.nfe_independent}, {cost.saving:.1%} saved; "
                 "copies for guidance are counted separately")
    return "\n".join(lines)


def _heading(plan: SharingPlan) -> str:
    sizes = [len(root.members) for root in plan.roots]
    shared = [size for size in sizes if size > 1]
    parts = [f"{_count(len(plan.leaves), 'image')}: {_count(len(shared), 'group')}"]
    if shared:
        span = f"{min(shared)}" if min(shared) == max(shared) else f"{min(shared)} to {max(shared)}"
        parts[0] += f" of {span} (mean {sum(shared) / len(shared):.2f})"
    parts.append(f"{sizes.count(1)} alone; mean size of all {sum(sizes) / len(sizes):.2f}")
    if plan.encoder:
        parts.append(f"encoder {plan.encoder}")
    if plan.similarity is not None:
        parts.append(f"similarity at least {plan.similarity:g}")
    return ", ".join(parts)


def _when(node: Node, spans: dict[int, tuple[int, int]], num_calls: int) -> str:
    first, end = spans.get(id(node), (0, 0))
    if node.until == 1.0:
        return f"one row to the end, call {first} to {end - 1}; the images come out equal"
    if first == end:
        return f"one row for no call of {num_calls} (share {node.until:.3g})"
    calls = f"call {first}" if end == first + 1 else f"calls {first} to {end - 1}"
    return f"one row for {calls} of {num_calls} (share {node.until:.3g})"


def branches(node: Node, names: list[str], spans: dict, num_calls: int, indent: str) -> list[str]:
    """The lines below a node: its children, or its members when it never parts."""
    parts = node.children or tuple(map(Node.single, node.members))
    lines = []
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        joint = "└─" if last else "├─"
        if len(part.members) == 1:
            mark = "*" if part.members[0] == node.representative else " "
            lines.append(f"{indent}{joint}{mark}{names[part.members[0]]}")
            continue
        mark = "*" if node.representative in part.members else " "
        lines.append(f"{indent}{joint}{mark}{len(part.members)} images: {_when(part, spans, num_calls)}")
        lines += branches(part, names, spans, num_calls, indent + ("    " if last else "│   "))
    return lines


def leaf_names(plan: SharingPlan, width: int) -> list[str]:
    """Each leaf's prompt in one line, with its image number where the prompt has several, and its seed."""
    images = Counter(leaf.prompt for leaf in plan.leaves)
    names = []
    for leaf in plan.leaves:
        prompt = CONTROLS.sub("�", " ".join(leaf.prompt.split()))
        if len(prompt) > width:  # alike prompts may differ at either end
            prompt = f"{prompt[: width * 2 // 3 - 1].rstrip()} … {prompt[-width // 3 + 2 :].lstrip()}"
        notes = [f"image {leaf.image_index}"] if images[leaf.prompt] > 1 or leaf.image_index else []
        notes += [f"seed {leaf.seed}"] if leaf.seed is not None else []
        names.append((prompt or '""') + (f"  ({', '.join(notes)})" if notes else ""))
    return names


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def plot(plan: SharingPlan, path: str | Path, num_calls: int = 20, max_leaves: int = 60) -> None:
    """Draw the plan into an image file: a lane per leaf, a cell per call, and below them the rows of every call."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise RuntimeError("plot needs matplotlib; pip install matplotlib") from None
    integer(max_leaves, "plot: max_leaves", 1)
    lanes, hidden = _lanes(plan, max_leaves)
    height = 0.23 * (max(lanes.values()) + 1)
    figure = Figure(figsize=(14, height + 3.0), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    ax, below = figure.subplots(2, 1, sharex=True, height_ratios=[height, 1.1])
    _draw_lanes(ax, plan, lanes, num_calls)
    _draw_rows(below, plan.resolve(num_calls).rows, len(plan.leaves))
    below.set_xlabel("denoiser call" + (f"   ({_count(hidden, 'more image')} not drawn)" if hidden else ""))
    cost = plan.cost(num_calls)
    figure.suptitle(f"{_heading(plan)}\n{cost.nfe} denoiser rows instead of {cost.nfe_independent}: "
                    f"{cost.saving:.1%} saved", fontsize=11, parse_math=False)
    figure.savefig(path)


def _lanes(plan: SharingPlan, max_leaves: int) -> tuple[dict[int, float], int]:
    """Leaf → height of its lane, groups first with gaps between them, and how many leaves were left out."""
    roots = sorted(plan.roots, key=lambda root: len(root.members) == 1)
    lanes: dict[int, float] = {}
    place = 0.0
    was_group = False
    for root in roots:
        is_group = len(root.members) > 1
        place += 0.6 if lanes and (is_group or was_group) else 0.0
        was_group = is_group
        for leaf in in_tree_order(root)[: max_leaves - len(lanes)]:
            lanes[leaf] = place
            place += 1.0
    return lanes, len(plan.leaves) - len(lanes)


def in_tree_order(node: Node) -> list[int]:
    return [leaf for child in node.children for leaf in in_tree_order(child)] or list(node.members)


def _draw_lanes(ax: Any, plan: SharingPlan, lanes: dict[int, float], num_calls: int) -> None:
    """Full colour where a row is evaluated, pale where a leaf rides on another leaf's row."""
    from matplotlib.patches import Patch

    colours = {}
    for number, root in enumerate(root for root in plan.roots if len(root.members) > 1):
        colours.update(dict.fromkeys(root.members, COLOURS[number % len(COLOURS)]))
    for first, end, node in plan.intervals(num_calls):
        shown = [leaf for leaf in node.members if leaf in lanes]
        shared = len(node.members) > 1
        for leaf in shown:
            alpha = (0.95 if shared else 0.5) if leaf == node.representative else 0.14
            cells = [(call, 1) for call in range(first, end)]
            ax.broken_barh(cells, (lanes[leaf] - 0.4, 0.8), color=colours.get(leaf, ALONE), alpha=alpha,
                           edgecolor="white", linewidth=0.8)
        if shared and end < num_calls and shown:
            ax.plot([end, end], [lanes[shown[0]] - 0.4, max(lanes[leaf] for leaf in shown) + 0.4],
                    color=colours[shown[0]], linewidth=1.6, solid_capstyle="butt")
    names = leaf_names(plan, 72)
    ax.set_yticks(list(lanes.values()), [names[leaf] for leaf in lanes], fontsize=9, parse_math=False)
    ax.set_ylim(max(lanes.values()) + 0.7, -0.7)
    ax.set_xlim(0, num_calls)
    ax.tick_params(length=0, labelbottom=False)
    ax.spines[:].set_visible(False)
    kinds = ((COLOURS[0], 0.95, "row shared by a group"), (COLOURS[0], 0.5, "row of one image"),
             (COLOURS[0], 0.14, "no row: uses the group's"), (ALONE, 0.5, "row of an image in no group"))
    ax.figure.legend(handles=[Patch(color=colour, alpha=alpha, label=label) for colour, alpha, label in kinds],
                     loc="outside lower center", ncols=4, frameon=False, fontsize=9)


def _draw_rows(ax: Any, rows: list[int], num_leaves: int) -> None:
    """Rows of every call as bars, against the rows without sharing."""
    from matplotlib.ticker import MaxNLocator

    calls = [call + 0.5 for call in range(len(rows))]
    ax.bar(calls, [num_leaves] * len(rows), width=1, color="#e5e7eb", edgecolor="white", linewidth=0.8)
    ax.bar(calls, rows, width=1, color="#374151", edgecolor="white", linewidth=0.8)
    ax.set_ylabel("rows evaluated\n(pale: saved)", fontsize=9)
    ax.set_ylim(0, num_leaves * 1.05)
    ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    step = max(1, len(rows) // 20)
    ax.set_xticks([call + 0.5 for call in range(0, len(rows), step)], [str(call) for call in range(0, len(rows), step)])
    ax.tick_params(axis="x", length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
