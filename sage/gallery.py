"""A run as one self-contained HTML page: each group, where it branched, what it cost.

The page is made from what the run wrote (manifest, plan, report and pictures), so it can be made again at any time.
Pictures are embedded as small copies; each links to its file. Every text from outside is escaped.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections import defaultdict
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image

from sage.gallery_page import PAGE, STYLE
from sage.output import PICTURE_NAME, SERIES, read_manifest, write_atomic
from sage.plan import ResolvedPlan, SharingPlan
from sage.prompts import count

CELL, GAP = 132, 10  # width of a picture and the space between two [px]; the style sheet has the same
TREE_HEIGHT = 92  # all denoiser calls, from the first down to the last [px]
SMALL = 128  # pictures up to this edge are embedded as they are [px]


def write_gallery(folder: str | Path) -> Path:
    """Make `index.html` of a run's output folder. Returns its path."""
    folder = Path(folder)
    path = folder / "index.html"
    write_atomic(path, gallery_html(folder))
    return path


def gallery_html(folder: Path) -> str:
    """The gallery of a run as HTML text.

    Args:
        folder: holds report.json, plan.json and manifest.jsonl, as `sage generate` leaves them.
    """
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    plan = SharingPlan.load(folder / "plan.json")
    shared = _pictures(folder, "images")
    unshared = _pictures(folder, "unshared")
    edge = _thumbnail_edge(len(shared) + len(unshared))
    num_calls = max((row.get("num_calls") or 1 for row in shared.values()), default=1)
    boundaries = (report.get("stats") or {}).get("boundaries")
    resolved = plan.resolve(num_calls, boundaries if boundaries and len(boundaries) == num_calls else None)
    cells = _Cells(folder, shared, unshared, edge)
    title = f"{count(len(shared), 'picture')} with shared denoising"
    groups = [number for number, root in enumerate(plan.roots) if len(root.members) > 1]
    alone = [root.members[0] for root in plan.roots if len(root.members) == 1]
    trees = _segments(plan, resolved)
    body = [_groups_html(plan, groups, trees, resolved, cells), _alone_html(folder, alone, cells)]
    return PAGE.format(
        title=html.escape(title),
        style=STYLE,
        head=_head_html(title, report, resolved, groups, alone, plan),
        body="\n".join(body),
        foot=_foot_html(report),
    )


class _Cells:
    """Pictures with their captions."""

    def __init__(self, folder: Path, shared: dict[int, dict], unshared: dict[int, dict], edge: int):
        self.folder, self.shared, self.unshared, self.edge = folder, shared, unshared, edge

    def figure(self, index: int, trunk: bool = False) -> str:
        row = self.shared.get(index)
        if row is None:
            return "<figure><figcaption><b>not finished</b></figcaption></figure>"
        prompt = html.escape(row["prompt"])
        number = f" · image {row['image_index'] + 1}" if row.get("image_index") else ""
        seed = html.escape(f"seed {_short(row.get('seed'))}{number}")
        links = self._link(row, prompt, trunk)
        if index in self.unshared and row["group_size"] > 1:
            links += self._link(self.unshared[index], prompt)
        hint = html.escape(f"{row['prompt']}\nseed {row.get('seed')}")
        return (
            f'<figure{" class=trunk" if trunk else ""} title="{hint}">{links}'
            f"<figcaption><b>{prompt}</b><small>{seed}</small></figcaption></figure>"
        )

    def _link(self, row: dict, prompt: str, trunk: bool = False) -> str:
        source = thumbnail(self.folder / row["file"], self.edge)
        badge = "<span>trunk</span>" if trunk else ""
        target = html.escape(quote(row["file"]))
        return f'<a href="{target}"><img loading="lazy" decoding="async" alt="{prompt}" src="{source}">{badge}</a>'


def thumbnail(path: Path, edge: int) -> str:
    """A data URI of the picture, at most `edge` pixels wide and high; small pictures stay as they are, losslessly."""
    with Image.open(path) as picture:
        picture = picture.convert("RGB")
    buffer = io.BytesIO()
    if max(picture.size) <= SMALL:
        picture.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        picture.thumbnail((edge, edge), Image.Resampling.LANCZOS)
        picture.save(buffer, "JPEG", quality=82)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _thumbnail_edge(pictures: int) -> int:
    """Larger copies while the page stays below about 15 MB."""
    return next((edge for limit, edge in ((250, 264), (1000, 176)) if pictures <= limit), SMALL)


def _pictures(folder: Path, series: str) -> dict[int, dict]:
    """Manifest rows of the pictures that are there, by index. Names that this package does not give are left out."""
    found = {}
    for row in read_manifest(folder / SERIES[series]):
        parent, _, name = str(row.get("file")).partition("/")
        ours = parent == series and PICTURE_NAME.fullmatch(name) and isinstance(row.get("index"), int)
        if ours and (folder / parent / name).is_file():
            found[row["index"]] = row
    return found


def _segments(plan: SharingPlan, resolved: ResolvedPlan) -> dict[int, dict[tuple, list[int]]]:
    """Per root, every node that runs: its members → [first call, call after its last]."""
    roots: dict[int, dict[tuple, list[int]]] = defaultdict(dict)
    root_of = plan.root_of
    for call, nodes in enumerate(resolved.members):
        for members in nodes:
            roots[int(root_of[members[0]])].setdefault(members, [call, call])[1] = call + 1
    return roots


def tree_svg(order: list[int], segments: dict[tuple, list[int]], num_calls: int) -> str:
    """The group as a tree growing down to its pictures: a node is a line from its first call to its last.

    Args:
        order: leaf indices from left to right.
        segments: members of each node → [first call, call after its last].
        num_calls: S, the height of the picture.
    """
    left = {leaf: position * (CELL + GAP) + CELL / 2 for position, leaf in enumerate(order)}

    def x(members: tuple) -> float:
        return sum(left[m] for m in members) / len(members)

    def y(call: int) -> float:
        return 6 + call / num_calls * TREE_HEIGHT

    width = len(order) * (CELL + GAP) - GAP
    lines, labels = [], []
    for members, (first, end) in sorted(segments.items(), key=lambda item: (-len(item[0]), item[1])):
        parent = next((other for other, span in segments.items() if span[1] == first and set(members) < set(other)), None)
        here, top, bottom = x(members), y(first), y(end)
        start = f"M{here:.1f} {top:.1f}"
        if parent is not None:
            bend = min(bottom, top + 22)
            start = f"M{x(parent):.1f} {top:.1f}C{x(parent):.1f} {bend:.1f} {here:.1f} {top:.1f} {here:.1f} {bend:.1f}"
        shared = len(members) > 1
        stroke = f"var(--{'bark' if shared else 'leaf'})"
        lines.append(f'<path d="{start}V{bottom:.1f}" stroke="{stroke}" stroke-width="{_thickness(len(members))}"/>')
        if shared:
            note = f"{len(members)} as one row, {count(end - first, 'call')}"
            height = (top + bottom) / 2 + 4 if parent is None else bottom - 1  # below the bend that led here
            labels.append(f'<text x="{here + 12:.1f}" y="{height:.1f}">{note}</text>')
    return (
        f'<svg width="{width}" height="{TREE_HEIGHT + 14}" role="img" aria-label="where the group branched">'
        f"{''.join(lines)}{''.join(labels)}</svg>"
    )


def _thickness(members: int) -> float:
    return 2.5 if members == 1 else min(5 + members * 0.75, 12)


def _groups_html(plan: SharingPlan, groups: list[int], trees: dict, resolved: ResolvedPlan, cells: _Cells) -> str:
    if not groups:
        return "<h2>No groups</h2><p class=soft>No two prompts are alike enough to share.</p>"
    cards = [_group_html(plan, number, place, trees[number], resolved, cells) for place, number in enumerate(groups, 1)]
    legend = (
        "<p class=soft>Time runs downwards: brown runs once for the whole group, green once per picture. "
        "The outlined picture lent the group its noise.</p>"
    )
    return f"<h2>{count(len(groups), 'group')}</h2>{legend}\n<div class=groups>\n" + "\n".join(cards) + "</div>"


def _group_html(plan, number: int, place: int, segments: dict, resolved: ResolvedPlan, cells: _Cells) -> str:
    root = plan.roots[number]
    order = [node.members[0] for node, _ in root.walk() if len(node.members) == 1] or list(root.members)
    rows = sum(end - first for first, end in segments.values())
    trunk_rows = sum(end - first for members, (first, end) in segments.items() if len(members) > 1)
    independent = len(root.members) * resolved.num_calls
    cosines = [cells.shared.get(leaf, {}).get("similarity_to_trunk") for leaf in order if leaf != root.representative]
    cosines = [value for value in cosines if value is not None]
    ends = sorted({f"{value:.2f}" for value in cosines})
    closeness = f"<p>cosine to trunk {' – '.join(ends[:1] + ends[1:][-1:])}</p>" if ends else ""
    figures = "".join(cells.figure(leaf, trunk=leaf == root.representative) for leaf in order)
    sides = "<div class=sides><span>shared</span><span>unshared</span></div>" if cells.unshared else ""
    return (
        f"<section class=group style=--n:{len(order)}><div class=about>"
        f"<h3>Group {place}</h3><p>{count(len(order), 'picture')}</p>"
        f"<p>{_branch_text(root, segments, resolved.num_calls)}</p>"
        f"{_bar(trunk_rows / independent, (rows - trunk_rows) / independent)}"
        f"<p>{rows:,} rows instead of {independent:,}<br><span class=save>{1 - rows / independent:.1%} saved</span></p>"
        f'{closeness}</div><div class="tree{" compared" if sides else ""}">'
        f"{tree_svg(order, segments, resolved.num_calls)}<div class=row>{sides}{figures}</div></div>"
        "</section>"
    )


def _branch_text(root, segments: dict, num_calls: int) -> str:
    end = segments[root.members][1] if root.members in segments else 0
    if end == num_calls:
        return f"shared all {num_calls} calls"
    tree = any(1 < len(members) < len(root.members) for members in segments)
    return f"{'first branched' if tree else 'branched'} after call {end} of {num_calls}"


def _bar(trunk: float, own: float) -> str:
    return (
        f'<div class=bar><i class=bark style="width:{trunk:.2%}"></i><i class=leaf style="width:{own:.2%}"></i></div>'
    )


def _alone_html(folder: Path, alone: list[int], cells: _Cells) -> str:
    if not alone:
        return ""
    note = "No prompt was near enough to share with, so these are what the pipeline draws without sharing."
    if cells.unshared:
        note += " " + _equality(folder, alone, cells)
    figures = "".join(cells.figure(leaf) for leaf in alone)
    return (
        f"<h2>{count(len(alone), 'picture')} on {'its' if len(alone) == 1 else 'their'} own</h2>"
        f"<p class=soft>{note}</p><div class=alone>{figures}</div>"
    )


def _equality(folder: Path, alone: list[int], cells: _Cells) -> str:
    """How the lone pictures compare with the run without sharing, measured on the files."""
    pairs = [leaf for leaf in alone if leaf in cells.shared and leaf in cells.unshared]
    furthest, equal = 0, 0
    for leaf in pairs:
        ours, theirs = (_pixels(folder / rows[leaf]["file"]) for rows in (cells.shared, cells.unshared))
        distance = 255 if ours.shape != theirs.shape else int(np.abs(ours - theirs).max())
        furthest, equal = max(furthest, distance), equal + (distance == 0)
    rest = "" if equal == len(pairs) else f"; the largest difference is {furthest} of 255 levels"
    return f"{equal} of {len(pairs)} equal their unshared picture in every pixel{rest}."


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), dtype=np.int16)


def _head_html(title: str, report: dict, resolved: ResolvedPlan, groups, alone, plan: SharingPlan) -> str:
    stats = report.get("stats") or {}
    if stats.get("pictures") != resolved.num_leaves:  # a run that was resumed: the whole plan's cost, not the last part's
        stats = {**stats, "nfe": resolved.nfe, "nfe_independent": resolved.nfe_independent, "rows": resolved.rows}
    nfe, independent = stats["nfe"], stats["nfe_independent"]
    sharing = resolved.num_leaves - len(alone)
    tiles = [
        tile(f"{1 - nfe / independent:.1%}", f"denoiser rows saved: {nfe:,} instead of {independent:,}", main=True),
        _clock_tile(report),
        tile(f"{sharing} of {resolved.num_leaves}", f"pictures share, in {count(len(groups), 'group')}"),
        tile(str(len(alone)), "drawn on their own" if len(alone) != 1 else "drawn on its own"),
    ]
    settings = report.get("settings") or {}
    facts = {
        "model": settings.get("model"),
        "solver": stats.get("solver") or settings.get("solver"),
        "denoiser calls": resolved.num_calls,
        "share": settings.get("share"),
        "similarity": settings.get("similarity"),
        "guidance": settings.get("guidance_scale"),
        "seed": settings.get("seed"),
        "grouped by": plan.encoder or None,
    }
    meta = " · ".join(f"{key} <b>{html.escape(str(value))}</b>" for key, value in facts.items() if value is not None)
    return (
        f"<h1>{html.escape(title)}</h1>\n<p class=meta>{meta}</p>\n<div class=tiles>{''.join(tiles)}</div>\n"
        + _rows_chart(stats["rows"], resolved)
    )


def tile(value: str, text: str, main: bool = False) -> str:
    return f'<div class="tile{" main" if main else ""}"><b>{html.escape(value)}</b><span>{html.escape(text)}</span></div>'


def _clock_tile(report: dict) -> str:
    stats, unshared = report.get("stats") or {}, report.get("unshared_stats") or {}
    seconds = stats.get("seconds")
    if not seconds:
        return tile("–", "seconds were not measured")
    if not unshared.get("seconds") or stats.get("kept") or unshared.get("kept"):
        return tile(f"{seconds:.1f} s", f"{stats.get('images_per_second', 0):.2f} pictures per second")
    shared = seconds + (report.get("seconds") or {}).get("planning", 0.0)  # sharing has to pay for its plan
    other = unshared["seconds"]
    clocks = f"{shared:.1f} s shared, {other:.1f} s unshared"
    if shared >= other:
        return tile(f"+{shared / other - 1:.1%}", f"more time: {clocks}")
    return tile(f"{1 - shared / other:.1%}", f"time saved: {clocks}", main=True)


def _rows_chart(rows: list[int], resolved: ResolvedPlan) -> str:
    """Rows per denoiser call, against one row per picture."""
    total, calls = resolved.num_leaves, len(rows)
    single = [sum(len(members) == 1 for members in nodes) for nodes in resolved.members]
    step, shapes = 1000 / calls, []
    for call, height in enumerate(rows):
        own = min(single[call] if call < len(single) else height, height)
        for value, base, color in ((own, 0, "leaf"), (height - own, own, "bark"), (total - height, height, "pale")):
            if value > 0:
                top = 100 - (base + value) / total * 100
                shapes.append(
                    f'<rect x="{call * step:.2f}" y="{top:.2f}" width="{max(step - 2, 1):.2f}" '
                    f'height="{value / total * 100:.2f}" fill="var(--{color})"/>'
                )
    keys = (("leaf", "one picture"), ("bark", "a group as one row"), ("pale", "rows not needed"))
    legend = "".join(f"<i class='key {color}'></i>{text}" for color, text in keys)
    return (
        f'<div class=chart><p class=soft>Rows in each of the {calls} denoiser calls (left to right): {legend}</p>'
        '<svg viewBox="0 0 1000 100" preserveAspectRatio="none" role="img" aria-label="rows per call">'
        f"{''.join(shapes)}</svg></div>"
    )


def _foot_html(report: dict) -> str:
    versions = " · ".join(f"{html.escape(str(k))} {html.escape(str(v))}" for k, v in (report.get("versions") or {}).items())
    machine = html.escape(str((report.get("machine") or {}).get("summary", "")))
    return (
        f"<p>{versions}</p><p>{machine}</p>"
        '<p><a href="report.json">report.json</a> · <a href="plan.json">plan.json</a> · '
        '<a href="manifest.jsonl">manifest.jsonl</a></p>'
    )


def _short(seed) -> str:
    text = str(seed)
    return text if len(text) <= 12 else f"{text[:5]}…{text[-4:]}"
