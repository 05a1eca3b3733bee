"""Contact sheets: the same few groups by every method, each a row of pictures under its prompts."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sage.evaluation.asked import Asked
from sage.evaluation.folder import EvaluationFolder
from sage.evaluation.methods import Method
from sage.evaluation.runner import file_names
from sage.output import write_atomic

__all__ = ["write_sheets"]

COLUMNS, SIDE, GAP, GROUP_GAP, LABEL, HEAD, LINE = 12, 96, 4, 18, 190, 76, 12  # [px] but the first, a number
PAPER, INK = (255, 255, 255), (31, 41, 55)


def write_sheets(folder: EvaluationFolder, methods: Sequence[tuple[Method, str]], asked: Asked) -> None:
    """sheets/METHOD.png, all images of the chosen groups, and sheets/side-by-side.png, the first image by every method.

    Args:
        methods: with the names to write beside them.
    """
    (folder.path / "sheets").mkdir(exist_ok=True)
    groups = shown_groups(asked)
    first: list[tuple[str, list[Path]]] = []
    for method, name in methods:
        files = file_names(folder, method)
        shown = [row for group in groups for row in group]
        lines = [(f"{name}\nseed {k + 1}", [files[row * asked.images + k] for row in shown]) for k in range(asked.images)]
        first.append((name, lines[0][1]))
        write_atomic(folder.path / "sheets" / f"{method.key}.png", _png(_sheet(lines, groups, asked.prompts)))
    write_atomic(folder.path / "sheets" / "side-by-side.png", _png(_sheet(first, groups, asked.prompts)))


def shown_groups(asked: Asked) -> list[tuple[int, ...]]:
    """The first groups of two or more that fit into the columns, at least one, which is cut if it is too long."""
    chosen: list[tuple[int, ...]] = []
    for group in asked.groups:
        if len(group) > 1 and sum(map(len, chosen)) + len(group) <= COLUMNS:
            chosen.append(group)
    return chosen or [next(group for group in asked.groups if len(group) > 1)[:COLUMNS]]


def _sheet(lines: Sequence[tuple[str, list[Path]]], groups: Sequence[Sequence[int]], prompts: Sequence[str]) -> Any:
    """Prompts on top, names at the left, a wider gap between groups."""
    from PIL import Image, ImageDraw, ImageFont

    lefts, x = [], LABEL
    for group in groups:
        for _ in group:
            lefts.append(x)
            x += SIDE + GAP
        x += GROUP_GAP
    sheet = Image.new("RGB", (x, HEAD + len(lines) * (SIDE + GAP)), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for left, row in zip(lefts, (row for group in groups for row in group)):
        _write(draw, font, left, 4, prompts[row], 16, HEAD // LINE - 1)
    for number, (name, files) in enumerate(lines):
        top = HEAD + number * (SIDE + GAP)
        _write(draw, font, 6, top + 6, name, 32, SIDE // LINE)
        for left, file in zip(lefts, files):
            with Image.open(file) as image:
                small = image.convert("RGB")
            enlarge = Image.Resampling.NEAREST if max(small.size) < SIDE else Image.Resampling.LANCZOS
            scale = SIDE / max(small.size)
            sheet.paste(small.resize([max(1, round(side * scale)) for side in small.size], enlarge), (left, top))
    return sheet


def _write(draw: Any, font: Any, left: int, top: int, text: str, width: int, most: int) -> None:
    """Some lines of text; letters that Pillow's own font does not have are question marks."""
    plain = text.encode("latin-1", "replace").decode("latin-1")
    lines = [line for part in plain.split("\n") for line in textwrap.wrap(part, width)][:most]
    for number, line in enumerate(lines):
        draw.text((left, top + number * LINE), line, fill=INK, font=font)


def _png(image: Any) -> bytes:
    import io

    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
