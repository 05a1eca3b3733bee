"""Group a prompt file that is larger than memory.

    found = group_file("prompts.txt", "groups.jsonl")

Texts are read where they are needed, embeddings and what is made of them lie in mapped files; memory is that of the edges and of a
few numbers per prompt. Groups are those of `sage.grouping`, and of no other order.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sage.embed_stream import embed_file
from sage.grouping import Groups, check_search, cluster
from sage.output import write_atomic
from sage.plan_checks import integer
from sage.prompt_stream import PromptFile
from sage.similarity import in_millionths, on_grid
from sage_kernels.grouping import UNITS

__all__ = ["group_file"]


def group_file(
    prompts: str | Path,
    out: str | Path,
    *,
    vectors: str | Path | None = None,
    encoder: str = "auto",
    similarity: float = 0.6,
    max_size: int = 8,
    search: str = "auto",
    recall: float = 0.97,
    device: str | torch.device = "auto",
    progress: bool = True,
    **embedding: Any,
) -> Groups:
    """Group the prompts of a file.

    Args:
        prompts: a text file with one prompt per line, or JSONL; see `sage.prompts`.
        out: JSONL with a line per group of two or more, {"members": [places in the file, from 0], "similarity": of the least
            similar pair}. A prompt that occurs again has the place of its first occurrence; one that the encoder does not know, or
            that has no neighbour, is in no line. It gets its name when it is complete.
        vectors: name of the .npy file for the embeddings; None: that of `out`. Embedding goes on where a run was stopped.
        encoder: see `sage.embed_prompts`.
        similarity, max_size, search, recall, device, progress: see `sage.grouping.find_groups`.
        embedding: further arguments of `sage.embed_stream.embed_file`, such as batch_size.

    Returns:
        Groups, of places in the file.

    Raises:
        InputError, ValueError, TypeError: of the file, of what lies at `vectors`, or an argument out of range; before anything is
            embedded, if it can be known.
    """
    least, max_size = in_millionths(similarity, "group_file: similarity"), integer(max_size, "group_file: max_size", 1)
    recall = check_search("group_file", search, recall)
    out = Path(out)
    if not out.absolute().parent.is_dir():
        raise ValueError(f"group_file: out must be in a folder that exists, got {str(out)!r}")
    with PromptFile(prompts) as file:
        where = {} if device == "auto" else {"device": device}
        embedded = embed_file(file, vectors or out.with_suffix(".npy"), encoder, progress=progress, **where, **embedding)
        wanted = np.zeros(len(file), dtype=bool)
        wanted[np.unique(file.first_positions())] = True
        wanted &= ~embedded.unknown
        order = file.canonical_order()
    order = order[wanted[order]]
    if len(order) == 0:
        groups = Groups([], "exact", 1.0, 0, 0)
    else:
        grid = on_grid(embedded.vectors, "group_file: vectors", order=order)
        groups = cluster(grid, order, least, max_size, search, recall, device, progress)
    write_atomic(out, "".join(f"{line}\n" for line in _lines(groups)))
    return groups


def _lines(groups: Groups) -> list[str]:
    shared = sorted((sorted(members), merges[-1][2]) for members, merges in groups.groups if len(members) > 1)
    return [json.dumps({"members": members, "similarity": height / UNITS}) for members, height in shared]
