"""The options of `sage evaluate`; apart from `sage.evaluation`, whose import takes long."""

from __future__ import annotations

import click

__all__ = ["evaluate_options"]

OPTIONS = (
    click.argument("prompts", required=False),
    click.option("--out", metavar="FOLDER", help="Where results, table, plot, sheets and all pictures go."),
    click.option("--model", metavar="ID|FOLDER", help="A diffusers model in safetensors. Default: the embedded emoji model."),
    click.option("--adapter", "adapters", multiple=True, metavar="LORA|FOLDER", help="A .safetensors file; all is drawn with it too."),
    click.option("--images", metavar="FOLDER", help="Real pictures to compare with; JSONL lines may name theirs: \"image\": \"1.png\"."),
    click.option("--solver", "solvers", multiple=True, help="ddim, dpm++2m … (`sage info --schedulers`). Default: the model's scheduler."),
    click.option("--steps", metavar="LIST", help="Step counts of independent sampling. Default: 30,25,20,15,12,10,8,6,5,4."),
    click.option("--comfortable", metavar="LIST", help="Draw all methods at these step counts too; 0: at the knee only. Default: the "
                 "largest of --steps."),
    click.option("--share", "shares", metavar="LIST", help="Fractions of the calls that groups share. Default: 0.1,0.2,0.3,0.4,0.5."),
    click.option("--budget", "budgets", metavar="LIST", help="Rows of trees, as fractions of those without sharing. Default: 0.9,0.8,0.7."),
    click.option("--method", "methods", multiple=True, help="fewer-steps, shared-noise, share, step-back, tree, cache. Default: all."),
    click.option("--images-per-prompt", type=int, help="Pictures of each prompt, each with a seed of its own. Default: 4."),
    click.option("--similarity", default=0.6, show_default=True, metavar="τ", help="Least cosine between any two prompts of a group."),
    click.option("--max-group-size", default=8, show_default=True, help="Most prompts in a group."),
    click.option("--all", "everyone", is_flag=True, help="Evaluate prompts without a neighbour too; they share with nobody."),
    click.option("--held-out", is_flag=True, help="The benchmark's prompts of emoji that the embedded model never saw."),
    click.option("--limit", type=int, metavar="N", help="Evaluate at most N prompts: whole groups, chosen at random by --seed."),
    click.option("--margin", default=0.05, show_default=True, help="What counts as equally good, relative to the best value."),
    click.option("--extractor", "extractors", multiple=True, metavar="NAME", help="emoji, clip:NAME, dinov2:NAME, inception:FILE; the "
                 "first one judges. Default: emoji, for the embedded model."),
    click.option("--guidance-scale", type=float, help="Classifier-free guidance. Default: the model's own."),
    click.option("--seed", default=0, show_default=True, help="Base seed; each picture's own comes from it and its prompt."),
    click.option("--max-rows", default=64, show_default=True, help="Most denoiser rows at once (guidance counts twice)."),
    click.option("--device", help="cpu, cuda, cuda:1 … Default: a GPU when there is one."),
    click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Default: float16 on GPUs."),
    click.option("--quick", is_flag=True, help="A look in a few minutes: few prompts, steps and methods; too little for claims."),
    click.option("--overwrite", is_flag=True, help="Replace what an earlier evaluation left in the output folder."),
    click.option("--resume", is_flag=True, help="Complete a run that was stopped, or draw and judge more: prompts, model and what else "
                 "decides pictures must be the same; methods, steps, solvers, extractors, --images and --margin may be others."),
    click.option("--table", metavar="FILE", help="Draw nothing: print the table of a results.json; with --out, write table and plot anew."),
)


def evaluate_options(command):
    """Give a click command the options of `sage evaluate`, under the names of `sage.evaluation.request.Request`."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command
