"""What `sage train` is told, and all that can be refused before a model is loaded or a folder touched."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sage.prompts import InputError, check_seed

__all__ = ["TrainOptions"]

SOFT_TARGETS = ("posterior", "own", "mean", "none")
CONSISTENCY_TARGETS = ("posterior", "equal")
CONSISTENCY_TEACHERS = ("self", "base")
PRECISIONS = ("no", "fp16", "bf16")
SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
INTERPOLATIONS = ("bicubic", "bilinear", "box", "hamming", "lanczos", "nearest", "nearest_exact")
NEEDS = ("peft", "accelerate")

# Options that change neither what is learned nor how: --resume_from_checkpoint may change them.
MAY_CHANGE = (
    "output_dir", "num_train_epochs", "max_train_steps", "gradient_checkpointing", "report_to", "checkpointing_steps",
    "checkpoints_total_limit", "resume_from_checkpoint", "validation_prompt", "num_validation_images", "validation_epochs",
    "dataloader_num_workers", "cache_latents", "cache_text", "train_batch_size", "mixed_precision",
)  # fmt: skip


@dataclass(frozen=True)
class TrainOptions:
    """Everything that a training is told; names and defaults are those of diffusers' `train_text_to_image_lora.py` where it has them.

    Args:
        output_dir: folder for the adapter, checkpoints, log and validation pictures.
        pretrained_model_name_or_path: a folder in diffusers' layout or a hub id; None: the embedded emoji model.
        train_data_dir, dataset_name: the pictures, one of the two; see `sage.training.data.read_training_set`.
        image_column, caption_column, max_train_samples: of them.
        resolution: side of the pictures [pixels]; None: 512, or the embedded model's own.
        center_crop, random_flip, image_interpolation_mode: see `sage.training.data.Transform`.
        similarity, max_group_size, encoder: how captions are grouped, see `sage.training.sampler.group_captions`.
        share: β, the fraction of the calls that groups will share.
        num_inference_steps: of the schedule in which they will.
        soft_target, branch_weight, consistency_weight, consistency_target, share_jitter, snr_gamma, caption_dropout, seed:
            see `sage.training.step.Objective`.
        consistency_teacher: who predicts for the members, "self" or "base", the model without its adapter.
        train_batch_size: most pictures of a step in each process.
        shards: see `sage.training.sampler.GroupBatchSampler`; None: the number of processes.
        gradient_accumulation_steps: steps whose gradients are added up before the weights change.
        num_train_epochs: how often every picture is seen, unless `max_train_steps` says when to stop.
        rank, lora_alpha: of the LoRA; alpha None: the rank.
        full: train all weights of the denoiser instead.
        resume_from_checkpoint: "latest", or a checkpoint's folder.
    """

    output_dir: str
    pretrained_model_name_or_path: str | None = None
    train_data_dir: str | None = None
    dataset_name: str | None = None
    image_column: str = "image"
    caption_column: str = "text"
    max_train_samples: int | None = None
    resolution: int | None = None
    center_crop: bool = False
    random_flip: bool = False
    image_interpolation_mode: str = "lanczos"
    similarity: float = 0.6
    max_group_size: int = 8
    encoder: str = "auto"
    share: float = 0.4
    num_inference_steps: int | None = None
    soft_target: str = "posterior"
    branch_weight: float = 1.0
    consistency_weight: float = 0.0
    consistency_target: str = "posterior"
    consistency_teacher: str = "self"
    share_jitter: float = 0.0
    snr_gamma: float | None = None
    caption_dropout: float = 0.0
    seed: int = 0
    train_batch_size: int = 16
    shards: int | None = None
    num_train_epochs: int = 100
    max_train_steps: int | None = None
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    learning_rate: float = 1e-4
    scale_lr: bool = False
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 500
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-2
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    rank: int = 4
    lora_alpha: float | None = None
    full: bool = False
    use_ema: bool = False
    mixed_precision: str | None = None
    report_to: str | None = None
    checkpointing_steps: int = 500
    checkpoints_total_limit: int | None = None
    resume_from_checkpoint: str | None = None
    validation_prompt: tuple[str, ...] = ()
    num_validation_images: int = 4
    validation_epochs: int = 1
    cache_latents: bool = False
    cache_text: bool = False
    dataloader_num_workers: int = 0

    @property
    def shares(self) -> bool:
        """Whether trunks are trained at all."""
        return self.soft_target != "none"

    def check(self) -> None:
        """Refuse what is out of range, unknown or does not fit together. Raises InputError; RuntimeError where a package is missing."""
        self._check_numbers()
        self._check_names()
        self._check_together()
        check_seed(self.seed, "--seed")
        missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
        if missing:
            raise RuntimeError(f'training needs {" and ".join(missing)}: pip install "sage-diffusion[train]"')
        self._check_folder()

    def _check_numbers(self) -> None:
        for name, low in (("max_train_samples", 1), ("resolution", 8), ("max_group_size", 1), ("num_inference_steps", 1),
                          ("train_batch_size", 1), ("shards", 1), ("num_train_epochs", 1), ("max_train_steps", 1),
                          ("gradient_accumulation_steps", 1), ("lr_warmup_steps", 0), ("rank", 1), ("checkpointing_steps", 1),
                          ("checkpoints_total_limit", 1), ("num_validation_images", 1), ("validation_epochs", 1),
                          ("dataloader_num_workers", 0)):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < low:
                raise InputError(f"--{name} must be at least {low}, got {value}.")
        for name, fits, wanted in (
            ("share", lambda x: 0 < x < 1, "in (0, 1), a fraction of the calls; --soft_target none shares nothing"),
            ("similarity", lambda x: -1 < x <= 1, "in (-1, 1]"),
            ("share_jitter", lambda x: 0 <= x <= 1, "in [0, 1], a fraction of all timesteps"),
            ("caption_dropout", lambda x: 0 <= x <= 1, "in [0, 1], a probability"),
            ("branch_weight", lambda x: 0 <= x < math.inf, "a number of at least 0"),
            ("consistency_weight", lambda x: 0 <= x < math.inf, "a number of at least 0"),
            ("learning_rate", lambda x: 0 < x < math.inf, "a number above 0"),
            ("snr_gamma", lambda x: x is None or 0 < x < math.inf, "a number above 0"),
            ("lora_alpha", lambda x: x is None or 0 < x < math.inf, "a number above 0"),
            ("adam_beta1", lambda x: 0 <= x < 1, "in [0, 1)"),
            ("adam_beta2", lambda x: 0 <= x < 1, "in [0, 1)"),
            ("adam_weight_decay", lambda x: 0 <= x < math.inf, "a number of at least 0"),
            ("adam_epsilon", lambda x: 0 <= x < math.inf, "a number of at least 0"),
            ("max_grad_norm", lambda x: 0 < x < math.inf, "a number above 0"),
        ):
            if not fits(getattr(self, name)):
                raise InputError(f"--{name} must be {wanted}, got {getattr(self, name):g}.")

    def _check_names(self) -> None:
        for name, known in (("soft_target", SOFT_TARGETS), ("consistency_target", CONSISTENCY_TARGETS),
                            ("consistency_teacher", CONSISTENCY_TEACHERS), ("lr_scheduler", SCHEDULES),
                            ("mixed_precision", (None, *PRECISIONS)), ("image_interpolation_mode", INTERPOLATIONS)):  # fmt: skip
            value = getattr(self, name)
            if value not in known:
                raise InputError(f"--{name} must be one of {', '.join(filter(None, known))}, got {value}.")

    def _check_together(self) -> None:
        if (self.train_data_dir is None) == (self.dataset_name is None):
            raise InputError("give the pictures by one of --train_data_dir (a folder) and --dataset_name (of the hub, or a folder of "
                             "`datasets`).")  # fmt: skip
        if self.train_data_dir is not None and not Path(self.train_data_dir).expanduser().is_dir():
            raise InputError(f"--train_data_dir {self.train_data_dir}: no such folder.")
        if not self.shares:
            for name, usual in (("branch_weight", 1.0), ("consistency_weight", 0.0), ("share_jitter", 0.0)):
                if getattr(self, name) != usual:
                    raise InputError(f"--soft_target none and --{name} exclude each other: without trunks there is nothing for it to "
                                     "act on.")  # fmt: skip
        if self.full and self.consistency_teacher == "base":
            raise InputError("--full and --consistency_teacher base exclude each other: no copy of the base model is kept; train a LoRA, "
                             "or use --consistency_teacher self.")  # fmt: skip
        if self.cache_latents and not self.center_crop:
            raise InputError("--cache_latents needs --center_crop: crops at random differ from epoch to epoch, so that there is nothing "
                             "to keep.")  # fmt: skip

    def _check_folder(self) -> None:
        """Refuse an output folder that cannot be used, and a checkpoint that is not there."""
        folder = Path(self.output_dir).expanduser()
        if folder.exists() and not folder.is_dir():
            raise InputError(f"--output_dir {self.output_dir}: this is a file; give a folder.")
        if self.resume_from_checkpoint is None:
            if folder.is_dir() and any(folder.iterdir()):
                raise InputError(f"--output_dir {self.output_dir}: the folder is not empty; --resume_from_checkpoint latest goes on with "
                                 "the training in it, or give another folder.")  # fmt: skip
            return
        if self.resume_from_checkpoint == "latest":
            if folder.is_dir() and any(folder.iterdir()) and not (folder / "training.json").is_file():
                raise InputError(f"--output_dir {self.output_dir}: --resume_from_checkpoint latest finds no training in this folder (no "
                                 "training.json).")  # fmt: skip
            return
        self.checkpoint_folder()

    def checkpoint_folder(self) -> Path | None:
        """The checkpoint to go on from; None: begin. Raises InputError for one that is named and not there."""
        from sage.training.checkpoint import checkpoints

        folder, given = Path(self.output_dir).expanduser(), self.resume_from_checkpoint
        if given is None:
            return None
        if given == "latest":
            found = checkpoints(folder)
            return found[-1] if found else None
        place = next((place for place in (Path(given).expanduser(), folder / given) if (place / "state.json").is_file()), None)
        if place is None:
            raise InputError(f"--resume_from_checkpoint {given}: no checkpoint there, nor in {folder} (no state.json); latest takes the last "
                             "one of --output_dir.")  # fmt: skip
        return place

    def settings(self, world_size: int, mixed_precision: str) -> dict[str, Any]:
        """What decides the course of the training, for the record and for resuming; defaults filled in by what accelerate says."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in MAY_CHANGE}
        values["images_per_step"] = self.train_batch_size * world_size
        values["mixed_precision"] = mixed_precision
        if self.lr_scheduler not in ("constant", "constant_with_warmup"):  # which go by the number of steps
            values |= {"num_train_epochs": self.num_train_epochs, "max_train_steps": self.max_train_steps}
        if self.shards is None:
            values["shards"] = world_size
        return values
