"""The training loop: batches of groups through `sage.training.step`, on any devices that accelerate knows.

    options = TrainOptions("out", train_data_dir="photos", max_train_steps=1000)
    pictures = read_training_set("photos")
    Trainer(family_for(pipe), pictures, group_captions(pictures.captions), options).run()

A training that was killed goes on from its last checkpoint with the same losses, and processes that share the work train as one with
their batches put together. (Tested on CPUs. What FSDP and DeepSpeed need, where each process holds a part of the model, is written
by accelerate's documentation and has never been run.)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from sage.adapters import AdapterSettings
from sage.commands import call_defaults
from sage.loading import EMBEDDED
from sage.output import write_atomic
from sage.prompts import InputError
from sage.training import checkpoint, validation
from sage.training.adapter import adapter_off, attach_adapter, save_adapter, trainable
from sage.training.data import TrainingSet, Transform, draw
from sage.training.families import Family
from sage.training.inputs import Inputs
from sage.training.joint import Timeline, branch_timestep
from sage.training.options import TrainOptions
from sage.training.record import Record
from sage.training.sampler import CaptionGroup, GroupBatch, GroupBatchSampler
from sage.training.shift import picture_side, set_timesteps_arguments
from sage.training.step import Objective, Step

__all__ = ["Trainer"]

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


class Trainer:
    """One training.

    Args:
        family: of the pipeline, which is trained in place, and should be on the CPU.
        training_set, groups: the pictures, and which captions are alike (`sage.training.sampler.group_captions`).
        options: checked options; their data and grouping options were used to make the two before.
        accelerator: None: one by the options.
        say: takes remarks.
        progress: show a bar, if standard error is a terminal.

    Attributes:
        step: steps done.
        total: steps to do.
        t_star: t* of the share.

    Raises:
        InputError: the pipeline and the options do not fit.
    """

    def __init__(
        self,
        family: Family,
        training_set: TrainingSet,
        groups: Sequence[CaptionGroup],
        options: TrainOptions,
        accelerator: Accelerator | None = None,
        say: Callable[[str], None] = print,
        progress: bool = True,
    ):
        self.family, self.options, self.training_set, self.groups = family, options, training_set, groups
        self.accelerator = make_accelerator(options) if accelerator is None else accelerator
        self.say = say if self.accelerator.is_main_process else lambda text: None
        self.progress, self.folder = progress, Path(options.output_dir).expanduser()
        self.record = Record(self.folder, self.accelerator.is_main_process)
        self.sharded = self.accelerator.distributed_type in SHARDED
        for option in ("consistency_weight", "use_ema"):
            if self.sharded and getattr(options, option):
                raise InputError(f"--{option} cannot be used under {self.accelerator.distributed_type.value}, where each process holds only "
                                 "a part of the model; leave it out.")  # fmt: skip
        embedded = options.pretrained_model_name_or_path is None
        self.resolution = picture_side(family, options.resolution, embedded)
        self.num_inference_steps = options.num_inference_steps or call_defaults(family.pipe, embedded=embedded)[0]
        self.t_star, self.timeline = self._timeline()
        self.sampler = self._make_sampler()
        self.step, self.total, self.seconds = 0, 0, 0.0
        self.settings = options.settings(self.accelerator.num_processes, self.accelerator.mixed_precision)

    def run(self) -> dict[str, Any]:
        """Train, and write the result. Returns the record that is in training.json."""
        place = self.options.checkpoint_folder()
        state = None if place is None else checkpoint.read_state(place)
        if state is not None:
            checkpoint.check_settings(place, state, self.settings)
            try:
                self.sampler.load_state_dict(state["sampler"])
            except ValueError as error:
                raise InputError(f"{place}: {error}.") from None
        self.accelerator.wait_for_everyone()  # so that no process finds a folder that another has made already
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
        self._start_record(0 if state is None else state["step"])  # before caches are filled, so that a kill there can be resumed
        self._prepare()
        if state is not None:
            self._resume(place, state)
        self._train()
        return self._finish()

    # ---- before

    def _timeline(self) -> tuple[float, Timeline]:
        """t* and the timesteps of training, by the schedule that sampling will use."""
        scheduler, options = self.family.pipe.scheduler, self.options
        schedule = set_timesteps_arguments(self.family, self.resolution, self.num_inference_steps)
        timeline = Timeline.of(scheduler, schedule.get("mu"))
        t_star = branch_timestep(scheduler, options.share, self.num_inference_steps, **schedule)
        if options.shares and not 0 < t_star < timeline.num_train_timesteps:
            what = "none" if t_star > 0 else "all"
            raise InputError(f"--share {options.share:g}: of the calls of {self.num_inference_steps} steps that is {what}; give another "
                             "share, or another --num_inference_steps.")  # fmt: skip
        return t_star, timeline

    def _make_sampler(self) -> GroupBatchSampler:
        options, accelerator = self.options, self.accelerator
        try:
            return GroupBatchSampler(self.groups, options.train_batch_size, options.seed, accelerator.process_index,
                                     accelerator.num_processes, shards=options.shards)  # fmt: skip
        except ValueError as error:
            raise InputError(f"--train_batch_size: {error}.") from None

    def _prepare(self) -> None:
        """Everything on its device: what is fed, what is trained, and what trains it."""
        options, accelerator, family = self.options, self.accelerator, self.family
        dtype = DTYPES[accelerator.mixed_precision]
        if options.full:
            family.denoiser.requires_grad_(True)
        else:
            attach_adapter(family.denoiser, family.lora_targets, options.rank, options.lora_alpha, options.seed)
        parts = family.pipe.components.values()
        self._frozen = [part for part in parts if isinstance(part, torch.nn.Module) and part is not family.denoiser]
        for part in self._frozen:
            part.requires_grad_(False).eval().to(accelerator.device, dtype)
        family.denoiser.to(accelerator.device, torch.float32 if options.full else dtype)
        parameters = trainable(family.denoiser)
        for parameter in parameters.values():
            parameter.data = parameter.data.float()
        if options.gradient_checkpointing:
            family.denoiser.enable_gradient_checkpointing()
        self._prepare_data()
        self._prepare_optimizer(parameters)
        self.ema = EMAModel(parameters.values()) if options.use_ema else None
        if self.ema is not None:
            self.ema.to(accelerator.device)
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = options.train_batch_size
        self.model, self.optimizer = accelerator.prepare(family.denoiser, self.optimizer)
        self.model.train()
        self._step = self._make_step()
        if options.report_to is not None:
            accelerator.init_trackers("sage-train", {name: str(value) for name, value in self.settings.items()})
        if self.sharded:
            self.say(f"{accelerator.distributed_type.value}: each process holds a part of the model, so checkpoints hold what accelerate's own "
                     "save_state writes, beside state.json, and validation prompts are not drawn.")  # fmt: skip

    def _prepare_optimizer(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        options = self.options
        self.names = list(parameters)
        self.optimizer = torch.optim.AdamW(
            parameters.values(),
            lr=self._learning_rate(),
            betas=(options.adam_beta1, options.adam_beta2),
            weight_decay=options.adam_weight_decay,
            eps=options.adam_epsilon,
        )
        self.total = options.max_train_steps or math.ceil(
            self.sampler.num_batches(0) * options.num_train_epochs / options.gradient_accumulation_steps
        )
        self.schedule = get_scheduler(
            options.lr_scheduler, self.optimizer, num_warmup_steps=options.lr_warmup_steps, num_training_steps=self.total
        )

    def _prepare_data(self) -> None:
        options, accelerator = self.options, self.accelerator
        transform = Transform(self.resolution, options.center_crop, options.random_flip, options.image_interpolation_mode)
        caches = {"cache_latents": options.cache_latents, "cache_text": options.cache_text}
        self.inputs = Inputs(self.family, self.training_set, transform, options.seed, self.folder / "cache", **caches)
        self.inputs.fill(accelerator.process_index, accelerator.num_processes, self.progress and accelerator.is_main_process)
        accelerator.wait_for_everyone()
        self.loader = self.inputs.loader(self.sampler, options.dataloader_num_workers)

    def _learning_rate(self) -> float:
        options = self.options
        images = options.train_batch_size * self.accelerator.num_processes * options.gradient_accumulation_steps
        return options.learning_rate * (images if options.scale_lr else 1)

    def _make_step(self) -> Step:
        options, family = self.options, self.family
        named = {name: getattr(options, name) for name in ("soft_target", "branch_weight", "consistency_weight", "consistency_target",
                 "share_jitter", "snr_gamma", "caption_dropout", "seed")}  # fmt: skip
        empty = family.encode_empty(1) if options.caption_dropout > 0 else None
        if not self.inputs.encodes:  # memory for what is trained
            self._move_frozen("cpu")
        teacher = partial(adapter_off, family.denoiser) if options.consistency_teacher == "base" else None
        return Step(family, self.timeline, Objective(self.t_star, **named), empty, teacher)

    def _move_frozen(self, device: Any) -> None:
        for part in self._frozen:
            part.to(device)

    # ---- resuming

    def _resume(self, place: Path, state: dict[str, Any]) -> None:
        self.step, self.seconds = state["step"], state["seconds"]
        if self.sharded:
            self.accelerator.load_state(str(place / "accelerate"))
        else:
            checkpoint.load_weights(place, "trainable", trainable(self.family.denoiser))
            checkpoint.load_optimizer(self.optimizer.optimizer, self.names, place)
            if self.accelerator.scaler is not None and state["scaler"]:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        self.schedule.load_state_dict(state["lr_scheduler"])
        for group, rate in zip(self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = rate
        if self.ema is not None:
            checkpoint.load_weights(place, "ema", dict(zip(self.names, self.ema.shadow_params, strict=True)))
            self.ema.optimization_step = state["ema_step"]
        self.say(f"Going on from {place.name}, step {self.step} of {self.total}.")

    def _save(self, batch: GroupBatch) -> None:
        """A checkpoint after a step whose last batch was `batch`."""
        files, more = {}, None
        if self.sharded:
            temporary = self.folder / ".accelerate"
            self.accelerator.save_state(str(temporary))
            self.accelerator.wait_for_everyone()
            more = lambda folder: temporary.rename(folder / "accelerate")
        else:
            files["trainable"] = trainable(self.family.denoiser)
            files["optimizer"] = checkpoint.optimizer_tensors(self.optimizer.optimizer, self.names)
        if self.ema is not None:
            files["ema"] = dict(zip(self.names, self.ema.shadow_params, strict=True))
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                "sampler": self.sampler.state_dict(after=batch),
                "lr_scheduler": self.schedule.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "ema_step": None if self.ema is None else self.ema.optimization_step,
                "seconds": self._elapsed(),
                "settings": self.settings,
            }
            checkpoint.write_checkpoint(self.folder, self.step, files, state, self.options.checkpoints_total_limit, more)
        self.accelerator.wait_for_everyone()

    # ---- training

    def _train(self) -> None:
        self._begun = time.perf_counter()
        self._window = torch.zeros(6, dtype=torch.float64, device=self.accelerator.device)
        shown = self.progress and self.accelerator.is_local_main_process
        with tqdm(initial=self.step, total=self.total, desc="training", unit="step", disable=None if shown else True) as self._bar:
            while self.step < self.total:
                self._epoch()

    def _epoch(self) -> None:
        """The batches of an epoch, or what is left of it, or of the training."""
        for item in self.loader:
            batch = item["batch"]
            self._batch(item)
            if not self.accelerator.sync_gradients:
                continue
            self.step += 1
            self._log(batch)
            if self.step % self.options.checkpointing_steps == 0 or self.step == self.total:
                self._save(batch)
            if self.step == self.total:
                return
        if (batch.epoch + 1) % self.options.validation_epochs == 0:
            self._validate()

    def _batch(self, item: dict[str, Any]) -> None:
        accelerator, options, batch = self.accelerator, self.options, item["batch"]
        torch.manual_seed(draw("dropout", options.seed, batch.epoch, batch.number, accelerator.process_index))  # of layers that drop out
        with accelerator.accumulate(self.model):
            latents, conditions = self.inputs(item, accelerator.device)
            losses = self._step(batch, latents, conditions, self.model)
            accelerator.backward(losses.loss * accelerator.num_processes)  # gradients are averaged over processes, not added
            self._window += losses.sums
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(self.model.parameters(), options.max_grad_norm)
            self.optimizer.step()
            if accelerator.sync_gradients:
                if not accelerator.optimizer_step_was_skipped:
                    self.schedule.step()
                if self.ema is not None:
                    self.ema.step(trainable(self.family.denoiser).values())
            self.optimizer.zero_grad()

    def _log(self, batch: GroupBatch) -> None:
        """One line of what the last step cost, over all processes."""
        loss, trunk, trunk_rows, branch, branch_rows, consistency = self.accelerator.reduce(self._window, "sum").tolist()
        self._window.zero_()
        windows = self.options.gradient_accumulation_steps
        values = {
            "loss": loss / windows,
            "trunk_loss": trunk / trunk_rows if trunk_rows else None,
            "branch_loss": branch / branch_rows if branch_rows else None,
            "consistency_loss": consistency / windows if self.options.consistency_weight > 0 else None,
            "lr": self.schedule.get_last_lr()[0],
        }
        rows = int(trunk_rows + branch_rows)
        self.record.log({"step": self.step, "epoch": batch.epoch, "rows": rows, **values, "seconds": self._elapsed()})
        if self.options.report_to is not None:
            self.accelerator.log({name: value for name, value in values.items() if value is not None}, step=self.step)
        shown = {name.removesuffix("_loss"): f"{values[name]:.4f}" for name in ("loss", "trunk_loss", "branch_loss") if values[name] is not None}
        self._bar.update()
        self._bar.set_postfix(shown)

    def _elapsed(self) -> float:
        return round(self.seconds + time.perf_counter() - self._begun, 3)

    def _validate(self) -> None:
        """Draw the validation prompts with sharing on, by the main process alone."""
        options = self.options
        if options.validation_prompt and not self.sharded and self.accelerator.is_main_process:
            self._move_frozen(self.accelerator.device)
            denoiser, folder = self.family.denoiser, self.folder / "validation" / f"step-{self.step:06d}"
            with validation.averaged(self.ema, trainable(denoiser).values()), validation.evaluating(denoiser, self.accelerator):
                validation.draw_pictures(self.family.pipe, folder, options, self.num_inference_steps, self.resolution)
            if not self.inputs.encodes:
                self._move_frozen("cpu")
        self.accelerator.wait_for_everyone()

    # ---- the record, and the end

    def _start_record(self, step: int) -> None:
        sizes = [len(group) for group in self.groups]
        self.record.start(
            step,
            settings=self.settings,
            t_star=self.t_star,
            num_inference_steps=self.num_inference_steps,
            resolution=self.resolution,
            pictures=len(self.training_set),
            groups=sum(size > 1 for size in sizes),
            captions=sum(sizes),
            captions_in_groups=sum(size for size in sizes if size > 1),
            processes=self.accelerator.num_processes,
        )

    def _finish(self) -> dict[str, Any]:
        """Write what was trained; with averaged weights, those."""
        accelerator, options = self.accelerator, self.options
        accelerator.wait_for_everyone()
        whole = accelerator.get_state_dict(self.model) if self.sharded else None
        self._validate()
        if self.ema is not None:
            self.ema.copy_to(trainable(self.family.denoiser).values())
        if accelerator.is_main_process:
            share = options.share if options.shares else None
            model = options.pretrained_model_name_or_path or EMBEDDED
            settings = AdapterSettings(share, self.num_inference_steps, options.soft_target, options.similarity, model)
            if options.full:
                self._save_pipeline(settings, whole)
            else:
                save_adapter(self.family, self.folder, settings, whole)
        size = sum(parameter.numel() for parameter in trainable(self.family.denoiser).values())
        record = self.record.finish(steps=self.step, seconds=self._elapsed(), trained_parameters=size)
        accelerator.wait_for_everyone()
        vars(self.family.denoiser).pop("forward", None)  # of mixed precision; the pipeline is the caller's again
        accelerator.end_training()
        return record

    def _save_pipeline(self, settings: AdapterSettings, state_dict: dict[str, torch.Tensor] | None) -> None:
        """The whole pipeline, for `from_pretrained`, and sage.json with what it was trained for."""
        self.family.pipe.save_pretrained(self.folder, safe_serialization=True)
        if state_dict is not None:
            denoiser = self.accelerator.unwrap_model(self.model)
            denoiser.save_pretrained(self.folder / self.family.denoiser_name, state_dict=state_dict, safe_serialization=True)
        write_atomic(self.folder / "sage.json", settings.to_json() + "\n")


def make_accelerator(options: TrainOptions) -> Accelerator:
    """The accelerator that the options, and accelerate's own configuration, ask for."""
    return Accelerator(
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        mixed_precision=options.mixed_precision,
        log_with=options.report_to,
        project_dir=options.output_dir,
    )
