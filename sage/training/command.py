"""What `sage train` does, from options to a trained adapter; sage/cli.py reads the options."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sage.loading import EMBEDDED, check_model, load_model
from sage.prompts import InputError, count
from sage.training.options import TrainOptions

if TYPE_CHECKING:
    from sage.training.sampler import CaptionGroup


def train(options: TrainOptions, say: Callable[[str], None], progress: bool = True) -> dict[str, Any] | None:
    """Look at everything, then train.

    Args:
        options: as they were given.
        say: takes remarks.
        progress: show bars.

    Returns:
        The record, see `sage.training.trainer.Trainer.run`; None in all processes but the first.

    Raises:
        InputError: something that was given cannot be used; nothing has been written then.
    """
    options.check()
    check_model(options.pretrained_model_name_or_path)
    from sage.training.data import read_training_set
    from sage.training.families import family_for
    from sage.training.trainer import DTYPES, Trainer, make_accelerator

    accelerator = make_accelerator(options)
    progress = progress and accelerator.is_main_process
    say = say if accelerator.is_main_process else lambda text: None
    pictures = read_training_set(
        options.train_data_dir or options.dataset_name,
        image_column=options.image_column,
        caption_column=options.caption_column,
        limit=options.max_train_samples,
        progress=progress,
    )
    say(f"Loading {options.pretrained_model_name_or_path or EMBEDDED} …")
    dtype = "float32" if options.full else str(DTYPES[accelerator.mixed_precision]).removeprefix("torch.")
    pipe = load_model(options.pretrained_model_name_or_path, "cpu", dtype)
    try:
        family = family_for(pipe)
    except NotImplementedError as error:
        raise InputError(f"--model {options.pretrained_model_name_or_path or EMBEDDED}: {error}.") from None
    room = options.train_batch_size * accelerator.num_processes // (options.shards or accelerator.num_processes)
    groups = group(options, pictures.captions, max(1, room), pipe, progress, say)
    trainer = Trainer(family, pictures, groups, options, accelerator, say, progress)
    alike = sum(len(members) for members in groups if len(members) > 1)
    what = f"trunks are trained from timestep {trainer.t_star:g} up" if options.shares else "nothing is shared"
    say(f"{count(len(pictures), 'picture')}, {count(sum(map(len, groups)), 'caption')}, {alike} of them in "
        f"{count(sum(len(members) > 1 for members in groups), 'group')}; {what}.")  # fmt: skip
    record = trainer.run()
    return record if accelerator.is_main_process else None


def group(
    options: TrainOptions, captions: Sequence[str], room: int, pipe: Any, progress: bool, say: Callable[[str], None]
) -> list[CaptionGroup]:
    """Group captions by the options, at most `room` of them. Raises InputError when --encoder cannot be used."""
    from sage.training.sampler import group_captions

    if room < options.max_group_size:
        say(f"Groups have at most {count(room, 'caption')}, what a batch of --train_batch_size has room for.")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            groups = group_captions(
                captions,
                similarity=options.similarity,
                max_group_size=min(options.max_group_size, room),
                encoder=options.encoder,
                pipe=pipe,
                progress=progress,
            )
        except (ValueError, TypeError, NotImplementedError, FileNotFoundError) as error:
            raise InputError(f"--encoder {options.encoder}: {error}") from error
    for warning in caught:
        say(f"Warning: {warning.message}")
    return groups
