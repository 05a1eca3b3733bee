"""The options of `sage train`; spelt, and with the defaults of, diffusers' `train_text_to_image_lora.py` where it has them."""

from __future__ import annotations

import click

from sage.training.options import (
    CONSISTENCY_TARGETS,
    CONSISTENCY_TEACHERS,
    INTERPOLATIONS,
    PRECISIONS,
    SCHEDULES,
    SOFT_TARGETS,
    TrainOptions,
)

__all__ = ["train_options"]


def _option(*names: str, help: str, **kwargs):
    """An option whose default is that of `TrainOptions`."""
    name = names[-1].removeprefix("--")
    field = TrainOptions.__dataclass_fields__[name]
    if not kwargs.get("is_flag") and not kwargs.get("multiple"):
        required = field.default is not None and not isinstance(field.default, (str, int, float))
        kwargs |= {"required": True} if required else {"default": field.default, "show_default": field.default is not None}
    return click.option(*names, name, help=help, **kwargs)


def _choice(name: str, known: tuple[str, ...], help: str):
    return _option(name, type=click.Choice(known), help=help)


OPTIONS = (
    _option("--model", "--pretrained_model_name_or_path", metavar="ID|FOLDER",
            help="A diffusers model in safetensors. Default: the embedded emoji model."),
    _option("--train_data_dir", metavar="FOLDER", help="Pictures with a metadata.jsonl or metadata.csv of file_name and text."),
    _option("--dataset_name", metavar="ID|FOLDER", help="A data set of the hub, or a folder of `datasets` (pip install datasets)."),
    _option("--image_column", help="Column of the pictures."),
    _option("--caption_column", help="Column of the captions."),
    _option("--max_train_samples", type=int, metavar="N", help="Only the first N pictures."),
    _option("--out", "--output_dir", metavar="FOLDER", help="Where adapter, checkpoints, log and validation pictures go."),
    _option("--resume_from_checkpoint", metavar="latest|FOLDER", help="Go on from a checkpoint; latest begins where there is none."),
    _option("--resolution", type=int, metavar="PIXELS", help="Side of the pictures. Default: 512; of the embedded model, its own."),
    _option("--center_crop", is_flag=True, help="Crop the centre of pictures that are no squares, not anywhere."),
    _option("--random_flip", is_flag=True, help="Mirror half of the pictures."),
    _choice("--image_interpolation_mode", INTERPOLATIONS, "How pictures are resized."),
    _option("--share", metavar="β", help="Fraction of the calls that groups will share, in (0, 1)."),
    _option("--num_inference_steps", type=int, metavar="N",
            help="Steps of the schedule in which they will. Default: of the pipeline's call."),
    _choice("--soft_target", SOFT_TARGETS,
            "What a trunk learns of its group: posterior, the mixture's expectation; own, one member's picture; mean, their mean picture. "
            "none: ordinary fine-tuning, nothing is shared."),
    _option("--branch_weight", metavar="W", help="Weight of the losses after the branch; those before have 1."),
    _option("--consistency_weight", metavar="W", help="Also hold the trunk at the branch against its members' predictions; costs rows."),
    _choice("--consistency_target", CONSISTENCY_TARGETS,
            "How these are weighted: by how likely each member is, or all alike, so that the trunk goes where all members agree."),
    _choice("--consistency_teacher", CONSISTENCY_TEACHERS, "Who predicts for the members: the model being trained, or the one before."),
    _option("--share_jitter", metavar="X", help="Move the branch in each group by up to this fraction of all timesteps."),
    _option("--similarity", metavar="τ", help="Least cosine between any two captions of a group."),
    _option("--max_group_size", metavar="N", help="Most captions in a group."),
    _option("--encoder", metavar="NAME", help="What compares captions: auto (in the package), pipeline, or a sentence encoder."),
    _option("--rank", metavar="R", help="Of the LoRA."),
    _option("--lora_alpha", type=float, metavar="A", help="The LoRA is scaled by alpha / rank. Default: the rank."),
    _option("--full", is_flag=True, help="Train all weights of the denoiser, not a LoRA, and save the whole pipeline."),
    _option("--train_batch_size", metavar="N", help="Most pictures of a step in each process; groups are not split."),
    _option("--shards", type=int, metavar="N",
            help="Pack batches for so many processes, so that the number may change on resuming. Default: as many as there are."),
    _option("--num_train_epochs", metavar="N", help="How often each picture is seen."),
    _option("--max_train_steps", type=int, metavar="N", help="Stop after so many steps, whatever the epochs."),
    _option("--gradient_accumulation_steps", metavar="N", help="Batches whose gradients make one step."),
    _option("--gradient_checkpointing", is_flag=True, help="Less memory, about a third more time."),
    _choice("--mixed_precision", PRECISIONS, "Default: as accelerate is configured."),
    _option("--learning_rate", metavar="LR", help="At the peak of the schedule."),
    _option("--scale_lr", is_flag=True, help="Multiply it by the pictures of a step, over all processes."),
    _choice("--lr_scheduler", SCHEDULES, "Its course."),
    _option("--lr_warmup_steps", metavar="N", help="Steps in which it rises; none for constant."),
    _option("--snr_gamma", type=float, metavar="γ", help="Min-SNR weights (arXiv:2303.09556); the paper has 5."),
    _option("--caption_dropout", metavar="P", help="Probability that a group's captions are dropped, for guidance."),
    _option("--use_ema", is_flag=True, help="Average the weights over the steps, and save the average."),
    _option("--adam_beta1", metavar="β₁", help="Of AdamW."),
    _option("--adam_beta2", metavar="β₂", help="Of AdamW."),
    _option("--adam_weight_decay", metavar="W", help="Of AdamW."),
    _option("--adam_epsilon", metavar="ε", help="Of AdamW."),
    _option("--max_grad_norm", metavar="X", help="Gradients are cut to this length."),
    _option("--checkpointing_steps", metavar="N", help="A checkpoint every so many steps, and at the end."),
    _option("--checkpoints_total_limit", type=int, metavar="N", help="Keep only the last N of them."),
    _option("--validation_prompt", multiple=True, metavar="TEXT", help="Draw it with sharing on, into FOLDER/validation; may be repeated."),
    _option("--num_validation_images", metavar="N", help="Pictures of each validation prompt."),
    _option("--validation_epochs", metavar="N", help="Draw them after every so many epochs, and at the end."),
    _option("--cache_latents", is_flag=True, help="Encode every picture once, and keep the latents in FOLDER/cache; with --center_crop."),
    _option("--cache_text", is_flag=True, help="Encode every caption once, and keep the embeddings in FOLDER/cache."),
    _option("--dataloader_num_workers", metavar="N", help="Processes that read pictures ahead."),
    _option("--report_to", metavar="NAME", help="tensorboard, wandb … as accelerate knows them. FOLDER/log.jsonl is always written."),
    _option("--seed", metavar="N", help="Of all that is random."),
)  # fmt: skip


def train_options(command):
    """Give a click command the options of `sage train`, under the names of `TrainOptions`."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command
