"""Group a prompt file that is larger than memory.

    found = group_file("prompts.txt", "groups.jsonl")

Texts are read where they are needed, at most 32 MB of the file at once; those are sorted, which takes some 130 MB. Embeddings, d
numbers each, lie in a mapped file. Beside the encoder there are in memory, roughly, for each prompt

    40 bytes                its places in the file and in the orders, and what is known of it; 60 more while repeats are looked for
    4·d bytes               its row on the grid; rows that would take more than 4 GiB together lie in a temporary file instead
    130 to 770 bytes        its short row, float32 [k + 1] with k from 32 to 192; 4·d where no short row is worth it
    4 to 256 bytes          in an approximate search: up to 64 cells, int32; four times as much again while they are sorted
    400 bytes               its group, as Python objects

and 40 bytes for each edge of a round, of which there are 20 million or 32 per prompt at a time. Groups are those of `sage.grouping`,
and of no other order.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sage.embed_stream import embed_file, files_of
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
    pipe: Any = None,
    batch_size: int = 64,
    chunk: int = 4096,
    resume: bool = True,
    similarity: float = 0.6,
    max_group_size: int = 8,
    search: str = "auto",
    recall: float = 0.97,
    device: str | torch.device = "auto",
    progress: bool = True,
) -> Groups:
    """Group the prompts of a file.

    Args:
        prompts: a text file with one prompt per line, or JSONL; see `sage.prompts`.
        out: JSONL with a line per group of two or more, {"members": [places in the file, from 0], "similarity": of the least
            similar pair}. A prompt that occurs again has the place of its first occurrence; one that the encoder does not know, or
            that has no neighbour, is in no line. It gets its name when it is complete, and replaces what had it.
        vectors: name of the .npy file for the embeddings; None: that of `out`, ending in .npy. Files that `embed_file` makes lie
            beside it. Embedding goes on where a run was stopped.
        encoder, pipe, batch_size, chunk, resume: see `sage.embed_file`.
        similarity, max_group_size, search, recall: see `sage.grouping.find_groups`.
        device: where prompts are embedded and their products made. "auto": they are embedded on the CPU, so that vectors are the same
            whether or not there is a GPU; products, which are exact anywhere, are made on a GPU for many prompts, if there is one.
        progress: show bars.

    Returns:
        Groups, of places in the file.

    Raises:
        InputError, ValueError, TypeError: of the file, of what lies at `vectors`, an argument out of range, or one file named for
            two things; before anything is embedded, if it can be known.
    """
    least, max_group_size = in_millionths(similarity, "group_file: similarity"), integer(max_group_size, "group_file: max_group_size", 1)
    recall = check_search("group_file", search, recall)
    out = Path(out)
    vectors = out.with_suffix(".npy") if vectors is None else Path(vectors)
    _check_files(Path(prompts), out, vectors)
    with PromptFile(prompts) as file:
        embedded = embed_file(file, vectors, encoder, pipe, batch_size=batch_size, chunk=chunk, resume=resume, progress=progress,
                              device="cpu" if device == "auto" else device)
        wanted = np.zeros(len(file), dtype=bool)
        wanted[np.unique(file.first_positions())] = True
        wanted &= ~embedded.unknown
        order = file.canonical_order()
    order = order[wanted[order]]
    if len(order) == 0:
        groups = Groups([], "exact", 1.0, 0, 0)
    else:
        grid = on_grid(embedded.vectors, "group_file: vectors", order=order)
        groups = cluster(grid, order, least, max_group_size, search, recall, device, progress)
    write_atomic(out, "".join(f"{line}\n" for line in _lines(groups)))
    return groups


def _check_files(prompts: Path, out: Path, vectors: Path) -> None:
    """Refuse an `out` that cannot be written, or would replace what is read."""
    if not out.absolute().parent.is_dir():
        raise ValueError(f"group_file: out must be in a folder that exists, got {str(out)!r}")
    if out.resolve() == prompts.resolve():
        raise ValueError(f"group_file: out must not be the file of the prompts, which it would replace, got {str(out)!r} for both")
    if out.resolve() in [file.resolve() for file in files_of(vectors)]:
        raise ValueError(f"group_file: out must not be a file of the embeddings, got out {str(out)!r} and vectors {str(vectors)!r}; "
                         "name groups .jsonl")


def _lines(groups: Groups) -> list[str]:
    shared = sorted((sorted(members), merges[-1][2]) for members, merges in groups.groups if len(members) > 1)
    return [json.dumps({"members": members, "similarity": height / UNITS}) for members, height in shared]
