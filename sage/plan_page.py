"""A plan as one self-contained HTML page: its numbers, and every group as lanes over the denoiser calls, to search and sort.

Nothing is loaded from anywhere: style, script and data are in the page, and its policy allows no other script. Prompts are data;
the script puts them into the page as text.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from importlib.resources import files
from string import Template
from typing import Any

from sage.drawing import in_tree_order
from sage.gallery import tile
from sage.gallery_page import STYLE
from sage.plan import SharingPlan
from sage.plan_report import aim_text, comparison_names, loss_note, shown_rows, size_bins
from sage.prompts import count


def plan_page(summary: dict[str, Any], plan: SharingPlan) -> str:
    """The page of a plan as HTML text.

    Args:
        summary: what `sage.plan_report.plan_summary` said of the plan.
        plan: the plan.
    """
    script = _template("plan.js")
    title = f"{count(summary['pictures'], 'picture')}, {count(len(summary['groups']), 'group')}"
    facts = {
        "planned as": aim_text(summary["aim"]),
        "denoiser calls": summary["num_calls"],
        "similarity at least": f"{summary['similarity']:g}",
        "compared by": summary["encoder"] or "given embeddings",
    }
    if summary["search"]["method"] == "approximate":
        facts["alike pairs found"] = f"{summary['search']['recall']:.0%}"
    meta = " · ".join(f"{key} <b>{html.escape(str(value))}</b>" for key, value in facts.items())
    return Template(_template("plan.html")).substitute(
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        title=html.escape(title),
        style=STYLE + _template("plan.css"),
        meta=meta,
        tiles=_tiles(summary),
        table=_table(summary),
        sizes=_sizes(summary),
        alike=_alike(summary),
        num_calls=summary["num_calls"],
        foot="Rows are denoiser rows; copies for guidance are counted separately. Made by sage-diffusion.",
        data=_as_script_data(page_data(summary, plan)),
        script=script,
    )


def page_data(summary: dict[str, Any], plan: SharingPlan) -> dict[str, Any]:
    """What the page's script draws.

    A group's "members" are leaves from the top lane down, its "nodes" [first lane, last lane, first call, end, lane of the
    representative, similarity].
    """
    root_of = plan.root_of
    groups = sorted(summary["groups"], key=lambda group: (-group["rows_saved"], group["members"]))
    share = summary["aim"].get("share", 0.4)
    return {
        "calls": summary["num_calls"],
        "share": round((share[0] if isinstance(share, list) else share) * summary["num_calls"]),
        "prompts": [" ".join(leaf.prompt.split()) for leaf in plan.leaves],
        "notes": [f" (image {leaf.image_index + 1})" if leaf.image_index else "" for leaf in plan.leaves],
        "groups": [
            _group_data(number, group, in_tree_order(plan.roots[int(root_of[group["members"][0]])]))
            for number, group in enumerate(groups, 1)
        ],
        "alone": summary["alone"],
        "flat": {key: summary["flat"][key] for key in ("saving", "expected_loss")},
    }


def _group_data(number: int, group: dict, order: list[int]) -> dict[str, Any]:
    lane_of = {leaf: lane for lane, leaf in enumerate(order)}
    nodes = []
    for node in group["nodes"]:
        lanes = [lane_of[member] for member in node["members"]]
        nodes.append([min(lanes), max(lanes), node["start"], node["end"], lane_of[node["representative"]], node["similarity"]])
    return {"number": number, "members": order, "trunk": group["representative"], "rows": group["rows_saved"], "saving": group["saving"],
            "similarity": group["similarity"], "loss": group["expected_loss"], "nodes": nodes}  # fmt: skip


def _as_script_data(data: dict) -> str:
    """JSON that ends no script element, whatever a prompt says."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _template(name: str) -> str:
    return (files("sage") / "templates" / name).read_text(encoding="utf-8")


def _tiles(summary: dict) -> str:
    ours = summary["comparison"][0]
    sharing = summary["pictures"] - len(summary["alone"])
    alike = summary["similarities"]
    tiles = [
        tile(f"{summary['saving']:.1%}", f"denoiser rows saved: {summary['nfe']:,} instead of {summary['nfe_independent']:,}", main=True),
        tile(f"{ours['expected_loss']:.5f}", f"expected loss per picture; the worst {ours['worst_loss']:.5f}"),
        tile(f"{ours['fewer_steps']:.1f} steps", f"without sharing cost the same (planned: {summary['num_calls']})"),
        tile(f"{sharing:,} of {summary['pictures']:,}", f"pictures share; {len(summary['alone']):,} alone"),
    ]
    if alike is not None:
        tiles.append(tile(f"{alike['median']:.2f}", f"median similarity of two in a group; {alike['min']:.2f} to {alike['max']:.2f}"))
    if ours["seconds"] is not None:
        tiles.append(tile(f"{ours['seconds']:,.0f} s", f"of denoising expected at {summary['rate']:,.4g} rows per second"))
    return "".join(tiles)


def _table(summary: dict) -> str:
    clock = summary["rate"] is not None
    heads = ["", "rows", "saved", "expected loss", "worst", "same cost", *(["seconds"] if clock else [])]
    names, lines = comparison_names(summary), []
    for row in shown_rows(summary):
        cells = [f"{row['nfe']:,}", f"{row['saving']:.1%}", f"{row['expected_loss']:.5f}", f"{row['worst_loss']:.5f}",
                 f"{row['fewer_steps']:.1f} steps"] + ([f"{row['seconds']:,.1f}"] if clock else [])  # fmt: skip
        ours = " class=ours" if row["name"] == "as planned" else ""
        lines.append(f"<tr{ours}><th scope=row>{html.escape(names[row['name']])}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = "".join(f"<th scope=col>{text}</th>" for text in heads)
    return (
        f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        f"<p class=note>Loss {html.escape(loss_note(summary))}. Same cost: as many steps without sharing cost as much.</p>"
    )


def _sizes(summary: dict) -> str:
    bins = size_bins(summary["sizes"])
    if not bins:
        return '<section class=panel><h2>Size of groups</h2><p class=soft>No two prompts are alike enough to share.</p></section>'
    return _bars("Size of groups", bins, "Pictures in a group, and number of such groups.")


def _alike(summary: dict) -> str:
    alike = summary["similarities"]
    if alike is None:
        return ""
    bins = [(f"{cell['from']:.2f}–{cell['to']:.2f}", cell["pairs"]) for cell in alike["histogram"]]
    ends = f"least {alike['min']:.2f}, median {alike['median']:.2f}, greatest {alike['max']:.2f}"
    return _bars("Similarity in groups", bins, f"Of two in a group, and number of such pairs; {ends}.")


def _bars(title: str, bins: list[tuple[str, int]], note: str) -> str:
    most = max(number for _, number in bins)
    rows = "".join(f'<dt>{name}</dt><dd><i style="width:{number / most:.1%}"></i></dd><dd>{number:,}</dd>' for name, number in bins)
    return f"<section class=panel><h2>{title}</h2><dl class=bins>{rows}</dl><p class=note>{note}</p></section>"
