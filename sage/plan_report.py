"""A plan in numbers and as text: what it shares, what that saves, and what it is expected to lose.

A saving never stands alone: beside it are the expected loss, and the trivial rival, fewer steps without sharing at the same cost.
"""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from sage.drawing import branches, leaf_names
from sage.plan import Node, SharingPlan
from sage.planning import SHARE, Planner
from sage.prompts import InputError, count

FORMAT, VERSION = "sage-diffusion plan report", 1
SHARES = (0.2, 0.4, 0.6)
TREE_MOST = 3000  # prompts up to which a tree is made only to compare with; its wide groups take a second and more
FEW_LONERS, FEW_GROUPS, FEW_LINES = 5, 3, 12  # examples, and lines of each group
BAR = 32  # characters of the longest bar
PROMPT = 84  # characters of a prompt in the text


def plan_summary(planner: Planner, rate: float | None = None) -> dict[str, Any]:
    """Everything that `sage plan` says, as plain data with keys that stay.

    Args:
        planner: has the plan and what it is compared with.
        rate: denoiser rows per second, to foretell seconds; None: no seconds.
    """
    plan, num_calls = planner.plan, planner.num_calls
    lost = planner.expected_loss(plan)
    groups = group_rows(planner, lost)
    flat = flat_curve(planner, groups)
    comparison = compare(planner, lost, flat, rate)
    alone = [root.members[0] for root in plan.roots if len(root.members) == 1]
    return {
        "format": FORMAT,
        "version": VERSION,
        "prompts": len(set(planner.prompts.prompts)),
        "pictures": len(plan.leaves),
        "num_calls": num_calls,
        "aim": _aim(planner),
        "encoder": plan.encoder,
        "similarity": plan.similarity,
        "search": _search(planner),
        "loss_table": _about_loss(planner),
        "nfe": comparison[0]["nfe"],
        "nfe_independent": comparison[-1]["nfe"],
        "saving": comparison[0]["saving"],
        "expected_loss": comparison[0]["expected_loss"],
        "rows": plan.resolve(num_calls).rows,
        "rate": rate,
        "savings": {row["name"]: row["saving"] for row in comparison},
        "comparison": comparison,
        "flat": flat,
        "sizes": {str(size): number for size, number in sorted(Counter(len(root.members) for root in plan.roots).items())},
        "similarities": spread(groups),
        "groups": [{key: value for key, value in group.items() if key != "pairs"} for group in groups],
        "alone": alone,
        "alone_examples": nearest(planner, [leaf for leaf in alone if plan.leaves[leaf].image_index == 0][:FEW_LONERS]),
    }


def group_rows(planner: Planner, lost: np.ndarray) -> list[dict[str, Any]]:
    """A dict for each group (root of several leaves), in the order of the plan; "pairs" are the cosines of its pairs, an array.

    Args:
        lost: float [B], expected loss of each picture.
    """
    plan, num_calls, images = planner.plan, planner.num_calls, planner.grouping.images_per_prompt
    nodes_of: dict[int, list] = {}
    root_of = plan.root_of
    for first, end, node in plan.intervals(num_calls):
        nodes_of.setdefault(int(root_of[node.members[0]]), []).append((first, end, node))
    rows = []
    for number, root in enumerate(plan.roots):
        if len(root.members) == 1:
            continue
        members = list(root.members)
        alike = _alike(planner, [member // images for member in members])
        nodes = [_node_row(span, members, alike) for span in nodes_of[number]]
        spent = sum(node["end"] - node["start"] for node in nodes)
        pairs = alike[np.triu_indices(len(members), 1)]
        rows.append({
            "size": len(members),
            "share": root.until,
            "similarity": _rounded(pairs.min()),
            "rows_saved": len(members) * num_calls - spent,
            "saving": _rounded(1 - spent / (len(members) * num_calls)),
            "expected_loss": _rounded(lost[members].mean()),
            "representative": root.representative,
            "members": members,
            "prompts": [plan.leaves[member].prompt for member in members],
            "nodes": nodes,
            "pairs": pairs,
        })  # fmt: skip
    return rows


def _alike(planner: Planner, prompts: list[int]) -> np.ndarray:
    """float64 [k, k]: cosines of some prompts."""
    from sage.similarity import similarity_matrix

    return similarity_matrix(planner.embeddings.vectors[prompts])


def _node_row(span: tuple[int, int, Node], members: list[int], alike: np.ndarray) -> dict[str, Any]:
    first, end, node = span
    places = [members.index(member) for member in node.members]
    least = alike[np.ix_(places, places)].min() if len(places) > 1 else 1.0
    return {"members": list(node.members), "representative": node.representative, "start": first, "end": end,
            "similarity": _rounded(least)}  # fmt: skip


def spread(groups: list[dict]) -> dict[str, Any] | None:
    """Least, median and greatest cosine of two members of a group, and how many pairs are in each eighth; None without groups."""
    if not groups:
        return None
    pairs = np.concatenate([group["pairs"] for group in groups])
    least, most = float(pairs.min()), float(pairs.max())
    numbers, edges = np.histogram(pairs, bins=8, range=(least, max(most, least + 0.08)))
    cells = zip(edges, edges[1:], numbers)
    histogram = [{"from": _rounded(low), "to": _rounded(high), "pairs": int(number)} for low, high, number in cells]
    return {"min": _rounded(least), "median": _rounded(np.median(pairs)), "max": _rounded(most), "histogram": histogram}


def compare(planner: Planner, lost: np.ndarray, flat: dict[str, Any], rate: float | None) -> list[dict[str, Any]]:
    """Cost and expected loss of the plan, of its rivals, and of no sharing, one dict each; no tree for very many prompts.

    Args:
        lost: float [B], expected loss of each picture of the plan.
        flat: what `flat_curve` returned.
    """
    pictures, num_calls = len(planner.plan.leaves), planner.num_calls
    independent = pictures * num_calls

    def row(name: str, nfe: int, mean: float, worst: float) -> dict[str, Any]:
        numbers = {"saving": 1 - nfe / independent, "expected_loss": mean, "worst_loss": worst, "fewer_steps": nfe / pictures}
        rounded = {key: _rounded(value) for key, value in numbers.items()}
        return {"name": name, "nfe": nfe, **rounded, "seconds": None if rate is None else _rounded(nfe / rate)}

    rows = [row("as planned", planner.plan.cost(num_calls).nfe, lost.mean(), lost.max())]
    for share in SHARES:
        call = min(int(share * num_calls + 0.5), num_calls - 1)
        rows.append(row(f"{share:.0%}", flat["nfe"][call], flat["expected_loss"][call], flat["worst_loss"][call]))
    if planner.tree_is_plan or len(set(planner.prompts.prompts)) <= TREE_MOST:
        lost = lost if planner.tree_is_plan else planner.expected_loss(planner.tree)
        rows.append(row("tree", planner.tree.cost(num_calls).nfe, lost.mean(), lost.max()))
    return [*rows, row("no sharing", independent, 0.0, 0.0)]


def flat_curve(planner: Planner, groups: list[dict]) -> dict[str, Any]:
    """What the flat plan's groups cost and lose when they share 0, 1, … calls, all but the last at most; `groups` are the plan's."""
    plan, num_calls, images = planner.flat, planner.num_calls, planner.grouping.images_per_prompt
    members = [root.members for root in plan.roots if len(root.members) > 1]
    if plan is planner.plan:
        heights = np.array([group["similarity"] for group in groups])
    else:
        heights = np.array([_alike(planner, [member // images for member in some]).min() for some in members])
    sizes = np.array([len(some) for some in members], dtype=np.int64)
    calls, total = np.arange(num_calls), len(plan.leaves)
    nfe = total * num_calls - calls * int((sizes - 1).sum())
    lost = planner.loss(heights[:, None], calls / num_calls) if members else np.zeros((1, num_calls))
    mean = (sizes @ lost if members else lost[0]) / total
    options = planner.grouping.flat_options
    return {
        "groups": len(members),
        "alone": total - int(sizes.sum()),
        "similarity": options["similarity"],
        "max_group_size": options["max_group_size"],
        "share": [_rounded(share) for share in calls / num_calls],
        "nfe": nfe.tolist(),
        "saving": [_rounded(saving) for saving in 1 - nfe / (total * num_calls)],
        "expected_loss": [_rounded(loss) for loss in mean],
        "worst_loss": [_rounded(loss) for loss in lost.max(axis=0)],
    }


def nearest(planner: Planner, leaves: list[int]) -> list[dict[str, Any]]:
    """Some leaves, each with the most similar other prompt, grouped or not; None where there is no other prompt."""
    prompts, vectors = np.array(planner.prompts.prompts, dtype=object), planner.embeddings.vectors
    rows = []
    for leaf in leaves:
        own = leaf // planner.grouping.images_per_prompt
        others = np.flatnonzero(prompts != prompts[own])
        unknown = bool(planner.embeddings.unknown[own])
        row = {"leaf": leaf, "prompt": prompts[own], "unknown": unknown, "nearest": None, "similarity": None}
        if len(others):
            cosines = (vectors @ vectors[own])[others]
            row |= {"nearest": prompts[others[cosines.argmax()]], "similarity": _rounded(min(cosines.max(), 1.0))}
        rows.append(row)
    return rows


def _aim(planner: Planner) -> dict[str, Any]:
    grouping = planner.grouping
    share = grouping.flat_options["share"]
    if grouping.aim in ("share", "tree"):
        return {"kind": grouping.aim, "share": list(share) if isinstance(share, tuple) else share}
    return {"kind": grouping.aim, grouping.aim: getattr(grouping, grouping.aim)}


def _search(planner: Planner) -> dict[str, Any]:
    """How groups were searched, and the share of the alike pairs that were found; None where the search did not say."""
    found = planner.searches[-1] if planner.searches else None
    return {
        "asked": planner.grouping.search,
        "method": None if found is None else found.search,
        "recall": None if found is None else _rounded(found.recall),
    }


def _about_loss(planner: Planner) -> dict[str, Any]:
    """Which table foretold the losses, and whether its similarities are those of the encoder in use, as far as is known."""
    from sage.encoders import SHIPPED

    path = planner.grouping.loss
    return {"source": path or "shipped", "fits_encoder": None if path else planner.plan.encoder == SHIPPED}


def _rounded(value: Any) -> float:
    return round(float(value), 6)


def read_rate(text: str | None) -> float | None:
    """--rate: denoiser rows per second, as a number or from the report.json of a run. Raises InputError for anything else."""
    if text is None:
        return None
    try:
        rate = float(text)
    except ValueError:
        rate = _measured_rate(Path(text))
    if not 0 < rate < float("inf"):
        raise InputError(f"--rate must be above 0, denoiser rows per second, got {text}.")
    return rate


def _measured_rate(path: Path) -> float:
    try:
        stats = json.loads(path.read_text(encoding="utf-8"))["stats"]
        return stats["nfe"] / stats["denoise_seconds"]
    except OSError as error:
        raise InputError(f"--rate {path}: neither a number nor a file that can be read ({error.strerror or error}).") from None
    except (ValueError, KeyError, TypeError, ZeroDivisionError):
        raise InputError(f"--rate {path}: no report.json of a finished `sage generate` (no stats with nfe and denoise_seconds in it); "
                         "give such a file, or the denoiser rows per second as a number.") from None  # fmt: skip


def plan_text(summary: dict, plan: SharingPlan, show_all: bool = False) -> str:
    """`plan_summary` for the eye, at most 110 columns; `show_all` lists every group and picture alone."""
    parts = [_heading(summary), _histogram(summary), _table(summary), _alone(summary, plan, show_all)]
    parts.append(_groups(summary, plan, show_all))
    return "\n\n".join(part for part in parts if part)


def aim_text(aim: dict) -> str:
    """What decides how much is shared, in a few words."""
    share = "{:g} to {:g} by similarity".format(*aim["share"]) if isinstance(aim.get("share"), list) else f"{aim.get('share')}"
    return {
        "share": f"share {share}",
        "tree": f"tree at the loss of share {share}",
        "budget": f"tree, budget {aim.get('budget')}",
        "quality": f"tree, quality {aim.get('quality')}",
    }[aim["kind"]]


def _heading(summary: dict) -> str:
    facts = [count(summary["pictures"], "picture")]
    if summary["prompts"] != summary["pictures"]:
        facts.append(f"of {count(summary['prompts'], 'prompt')}")
    facts = [" ".join(facts), f"{count(summary['num_calls'], 'denoiser call')} each", aim_text(summary["aim"])]
    line = f"{count(len(summary['groups']), 'group')} (similarity at least {summary['similarity']:g}), {len(summary['alone'])} alone"
    search = summary["search"]
    recall = f"\napproximate search: about {search['recall']:.0%} of the alike pairs found" if search["method"] == "approximate" else ""
    return f"{', '.join(facts)}\n{line}, compared by {summary['encoder'] or 'given embeddings'}{recall}"


def size_bins(sizes: dict[str, int]) -> list[tuple[str, int]]:
    """How many groups there are of each size, or range of sizes, at most ten lines; pictures alone are left out."""
    groups = {int(size): number for size, number in sizes.items() if size != "1"}
    if not groups:
        return []
    least, widest = min(groups), max(groups)
    step = -(-(widest - least + 1) // 10)
    found = []
    for low in range(least, widest + 1, step):
        high = min(low + step - 1, widest)
        number = sum(groups.get(size, 0) for size in range(low, high + 1))
        found.append((f"{low}" if low == high else f"{low}–{high}", number))
    return found


def _histogram(summary: dict) -> str:
    """Groups by size, and how alike their members are."""
    bins = size_bins(summary["sizes"])
    if not bins:
        return "No two prompts are alike enough to share; a lower --similarity finds more."
    most, alike = max(number for _, number in bins), summary["similarities"]
    lines = ["Size of groups", *(f"  {name:>7}  {'█' * -(-number * BAR // most):<{BAR}}  {number:,}" for name, number in bins)]
    lines.append(f"Similarity of two in a group: least {alike['min']:.2f}, median {alike['median']:.2f}, greatest {alike['max']:.2f}")
    return "\n".join(lines)


def comparison_names(summary: dict) -> dict[str, str]:
    """What the rows of the comparison are called."""
    flat = {f"{share:.0%}": f"flat, share {share:.0%}" for share in SHARES}
    ours = {"as planned": f"this plan: {aim_text(summary['aim'])}"}
    return ours | flat | {"tree": f"tree at the loss of share {SHARE:.0%}", "no sharing": "no sharing"}


def shown_rows(summary: dict) -> list[dict]:
    """The comparison without rows that say of the plan itself what its own row says."""
    ours, *others = summary["comparison"]
    aim = summary["aim"]
    itself = ""
    if aim["kind"] == "share" and aim["share"] in SHARES:
        itself = f"{aim['share']:.0%}"
    elif aim == {"kind": "tree", "share": SHARE}:
        itself = "tree"
    return [ours, *(row for row in others if row["name"] != itself)]


def loss_note(summary: dict) -> str:
    """Where expected losses come from."""
    table = summary["loss_table"]
    if table["source"] != "shipped":
        return f"expected per picture, by {table['source']}"
    if table["fits_encoder"]:
        return "expected per picture, by the table that ships: margin of own caption over a like one, embedded model"
    return "expected per picture, by the table that ships, which was not made with this encoder: --loss takes one that was"


def _table(summary: dict) -> str:
    """Cost and loss of the plan and its rivals."""
    names, clock = comparison_names(summary), summary["rate"] is not None
    width = max(map(len, names.values()))
    head = f"  {'':{width}}  {'rows':>11}  {'saved':>6}  {'loss: mean':>10}  {'worst':>8}  {'same cost':>11}"
    lines = [head + (f"  {'seconds':>9}" if clock else "")]
    for row in shown_rows(summary):
        mark = "→" if row["name"] == "as planned" else " "
        lines.append(
            f"{mark} {names[row['name']]:{width}}  {row['nfe']:>11,}  {row['saving']:>6.1%}  {row['expected_loss']:>10.5f}  "
            f"{row['worst_loss']:>8.5f}  {row['fewer_steps']:>5.1f} steps" + (f"  {row['seconds']:>9,.1f}" if clock else "")
        )
    notes = [f"loss: {loss_note(summary)}", "same cost: as many steps without sharing cost as much"]
    if "tree" not in summary["savings"]:
        notes.append(f"--tree, which loses as little at fewer rows, is not compared for more than {TREE_MOST:,} prompts: ask for it")
    return "\n".join([*lines, *(textwrap.fill(note, 100, initial_indent="  ", subsequent_indent="    ") for note in notes)])


def _alone(summary: dict, plan: SharingPlan, show_all: bool) -> str:
    alone, examples = summary["alone"], summary["alone_examples"]
    if not alone:
        return ""
    lines = [f"Alone: {count(len(alone), 'picture')}" + (", for instance" if len(alone) > len(examples) and not show_all else "")]
    names = leaf_names(plan, PROMPT)
    if show_all:
        return "\n".join(lines + [f"  {names[leaf]}" for leaf in alone])
    for example in examples:
        why = "no other prompt" if example["nearest"] is None else f"nearest {example['similarity']:.2f}"
        why = "unknown words" if example["unknown"] else why
        lines.append(f"  {why:<15}  {names[example['leaf']]}")
    return "\n".join(lines)


def _groups(summary: dict, plan: SharingPlan, show_all: bool) -> str:
    """The groups that save most, as trees."""
    groups = sorted(summary["groups"], key=lambda group: (-group["rows_saved"], group["members"]))
    if not groups:
        return ""
    num_calls = summary["num_calls"]
    names = leaf_names(plan, PROMPT)
    spans = {id(node): (first, end) for first, end, node in plan.intervals(num_calls)}
    root_of = plan.root_of
    shown = groups if show_all else groups[:FEW_GROUPS]
    lines = []
    for group in shown:
        root = plan.roots[int(root_of[group["members"][0]])]
        end = spans.get(id(root), (0, 0))[1]
        lines.append(f"  {group['size']} pictures, similarity {group['similarity']:.2f}, one row for {end} of {num_calls} calls, "
                     f"{group['saving']:.1%} saved, loss {group['expected_loss']:.5f}")
        tree = branches(root, names, spans, num_calls, "    ")
        cut = None if show_all or len(tree) <= FEW_LINES + 1 else FEW_LINES
        lines += tree[:cut] + ([] if cut is None else [f"    … {len(tree) - cut} more lines"])
    rest = "" if len(shown) == len(groups) else f"; --all lists all {len(groups):,}, --html shows them"
    return "\n".join([f"Groups that save most (* gives the noise of the shared part{rest})", *lines])
