"""The `sage` command: info, plan, generate, evaluate, train. Heavy imports wait until a command needs them."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
import warnings
from pathlib import Path

import click

from sage.evaluation_flags import evaluate_options
from sage.prompts import InputError, count
from sage.training.flags import train_options
from sage_kernels.version import __version__

EXIT_FAILURE, EXIT_INPUT, EXIT_BELOW, EXIT_INTERRUPTED = 1, 2, 3, 130
PLOTS = (".png", ".svg", ".pdf")
VECTORS = (".npy", ".parquet")

GROUPING_OPTIONS = (
    click.option("--share", metavar="β|LOW:HIGH", help="Fraction of the calls that a group shares, 0 to 1; LOW:HIGH: each group by its "
                 "own similarity, HIGH where all are equal. Default: 0.4."),
    click.option("--tree", is_flag=True, help="Inside a group, the less alike, the earlier they part; loses as much as the flat plan of "
                 "--share is expected to, and saves more."),
    click.option("--budget", type=float, metavar="X", help="The tree that loses least at this fraction of the rows without sharing."),
    click.option("--quality", type=click.Choice(["high", "balanced", "fast"]), help="The tree that spends a row wherever it is worth it."),
    click.option("--similarity", type=float, metavar="τ", help="Least cosine between any two prompts of a group. Default: 0.6; for trees "
                 "0.3, as little alike prompts part early."),
    click.option("--max-group-size", type=int, metavar="N", help="Most prompts in a group. Default: 8; for trees 32."),
    click.option("--images-per-prompt", default=1, show_default=True, help="Pictures of each prompt."),
    click.option("--loss", metavar="FILE", help="What sharing costs: a loss table of your model. Default: the embedded model's."),
    click.option("--encoder", metavar="NAME", help="What compares prompts: auto (in the package; the default), pipeline (the model's "
                 "own text encoder), or a folder or hub id of a sentence encoder."),
    click.option("--embeddings", metavar="FILE", help="Read vectors instead of making them: .npy [n, d] in the order of the prompts, or "
                 ".parquet with the columns prompt and embedding."),
    click.option("--cache", metavar="FOLDER", help="Where vectors are kept for the next time. Default: see `sage cache`."),
    click.option("--no-cache", is_flag=True, help="Neither read nor keep vectors."),
    click.option("--search", default="auto", show_default=True, type=click.Choice(["auto", "exact", "approximate"]),
                 help="Compare all pairs, or likely ones only; auto: by the number of prompts and the machine."),
    click.option("--model", metavar="ID|FOLDER", help="A diffusers model in safetensors. Default: the embedded emoji model."),
    click.option("--device", help="cpu, cuda, cuda:1 … Default: a GPU when there is one."),
    click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Default: float16 on GPUs."),
)  # fmt: skip


OF_GROUPING = ("share", "tree", "budget", "quality", "similarity", "max_group_size", "images_per_prompt", "loss", "encoder",
               "embeddings", "cache", "no_cache", "search")  # fmt: skip


def grouping_options(command):
    """The options that `plan` and `generate` have in common."""
    for option in reversed(GROUPING_OPTIONS):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="sage-diffusion")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def cli(context, debug: bool):
    """Similar prompts share their early denoising steps.

    \b
    See what sharing would save, then do it:
      sage plan prompts.txt
      sage generate prompts.txt --out pictures
      sage generate prompts.txt --out pictures --model FOLDER --solver dpm++2m --steps 20 --tree
      sage evaluate prompts.txt --out evaluation

    PROMPTS is a text file with one prompt per line, a .jsonl file with {"prompt": …} and, if wanted, "negative_prompt"
    and "seed" per line, or - for standard input.
    """
    context.obj = debug


@cli.command()
@click.option("--schedulers", is_flag=True, help="List solver names, and which diffusers schedulers have a fast path.")
@click.pass_obj
def info(debug: bool, schedulers: bool):
    """Show versions, devices, kernel backends, build, model and embedding cache.

    \b
    Examples:
      sage info                 what is installed, and why a backend cannot run
      sage info --schedulers    names for --solver
    """
    with _clean_errors(debug):
        from sage.info import info_text, schedulers_text

        click.echo(schedulers_text() if schedulers else info_text())


@cli.command()
@click.option("--folder", metavar="FOLDER", help="Another cache than the usual one.")
@click.option("--clear", is_flag=True, help="Remove the vectors in it, and no other file.")
@click.pass_obj
def cache(debug: bool, folder: str | None, clear: bool):
    """Show where embeddings of prompts are kept, and how many; --clear removes them.

    \b
    Examples:
      sage cache                          place and size; SAGE_CACHE_DIR moves it
      sage cache --clear
      sage cache --folder shared --clear  that of --cache shared
    """
    with _clean_errors(debug):
        from sage.embed_cache import cache_info, clear_cache
        from sage.info import cache_text

        if clear:
            click.echo(f"Removed {cache_text(clear_cache(folder))}.")
        else:
            click.echo(cache_text(cache_info(folder)))


@cli.command()
@click.argument("prompts")
@grouping_options
@click.option("--steps", default=20, show_default=True, help="Denoiser calls to plan for.")
@click.option("--rate", metavar="ROWS/S|FILE", help="Foretell seconds: denoiser rows per second, or report.json of a `sage generate`.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@click.option("--html", metavar="FILE", help="Write a page with every group, to search and sort; needs no other file.")
@click.option("--out", metavar="FILE", help="Save the plan; `sage generate --plan FILE` follows it.")
@click.option("--plot", metavar="FILE", help="Draw the plan into a .png, .svg or .pdf file.")
@click.option("--save-embeddings", metavar="FILE", help="Keep the vectors in a .npy or .parquet file for --embeddings.")
@click.option("--fail-below", type=float, metavar="SAVING", help="Exit code 3 when less than this fraction of the rows is saved.")
@click.option("--all", "show_all", is_flag=True, help="List every group and every picture alone, not a few of them.")
@click.pass_obj
def plan(debug, prompts, steps, model, device, dtype, rate, fail_below, as_json, html, out, plot, save_embeddings, show_all, **options):
    """Group PROMPTS and show what sharing would save and lose. No picture is made.

    How much is shared is one of --share (flat: a group runs as one row, then all part), --tree, --budget and --quality.

    \b
    Examples:
      sage plan prompts.txt
      sage plan prompts.txt --similarity 0.7 --share 0.3
      sage plan prompts.txt --share 0.2:0.6             each group by its own similarity
      sage plan prompts.txt --tree                      the loss of share 0.4, fewer rows
      sage plan prompts.txt --budget 0.6 --steps 30     at most 60 % of the rows
      sage plan prompts.txt --quality high --html plan.html
      sage plan prompts.jsonl --out plan.json --plot plan.png
      sage plan prompts.txt --embeddings clip.npy --rate pictures/report.json
      grep fox prompts.txt | sage plan - --json --fail-below 0.1

    \b
    Exit codes:
      0  done                        2  prompts, options or files cannot be used
      1  something failed            3  less saved than --fail-below asks for
    """
    with _clean_errors(debug):
        from sage.commands import Outputs, plan_prompts_of
        from sage.plan_report import plan_text
        from sage.planning import Grouping

        if steps < 1:
            raise InputError(f"--steps must be at least 1, got {steps}.")
        if fail_below is not None and not -1 <= fail_below <= 1:
            raise InputError(f"--fail-below must be a fraction of the rows such as 0.1, got {fail_below:g}.")
        grouping = Grouping.from_options(**options)
        written = {"--out": out, "--html": html, "--plot": plot, "--save-embeddings": save_embeddings}
        for file, endings in ((out, ()), (html, ()), (plot, PLOTS), (save_embeddings, VECTORS)):
            _check_file(file, endings)
        _check_apart(written, {"PROMPTS": prompts, "--embeddings": grouping.embeddings, "--loss": grouping.loss, "--rate": rate})
        outputs = Outputs(plan=out, plot=plot, html=html, embeddings=save_embeddings)
        pipe_options = {"model": model, "device": device, "dtype": dtype}
        summary, made = plan_prompts_of(prompts, grouping, steps, rate, outputs, pipe_options, _say, sys.stderr.isatty())
        click.echo(json.dumps(summary, ensure_ascii=False, indent=1) if as_json else plan_text(summary, made, show_all))
        if fail_below is not None and summary["saving"] < fail_below:
            _say(f"Saves {summary['saving']:.1%} of the denoiser rows, below the {fail_below:.1%} of --fail-below.")
            sys.exit(EXIT_BELOW)


@cli.command()
@click.argument("prompts")
@click.option("--out", required=True, metavar="FOLDER", help="Where pictures, manifest, plan, report and gallery go.")
@grouping_options
@click.option("--adapter", metavar="LORA|FOLDER", help="A .safetensors file, or the folder of a `sage train`; its share is the default.")
@click.option("--plan", metavar="FILE", help="Follow a plan saved by `sage plan --out` instead of making one.")
@click.option("--steps", type=int, help="Denoising steps. Default: the model's own.")
@click.option("--solver", help="ddim, euler, dpm++2m, unipc … (`sage info --schedulers`). Default: the model's scheduler.")
@click.option("--seed", default=0, show_default=True, help="Base seed; each picture's own comes from it and its prompt.")
@click.option("--guidance-scale", type=float, help="Classifier-free guidance. Default: the model's own.")
@click.option("--negative-prompt", help="For every prompt that brings none of its own.")
@click.option("--max-rows", default=64, show_default=True, help="Most denoiser rows at once (guidance counts twice).")
@click.option("--engine", default="auto", show_default=True, type=click.Choice(["auto", "native", "hook"]),
              help="native: the package's own loop, for pipelines it knows; hook: the pipeline's loop.")
@click.option("--compare", is_flag=True, help="Make every picture without sharing too, and put both side by side.")
@click.option("--overwrite", is_flag=True, help="Replace what an earlier run left in the output folder.")
@click.option("--resume", is_flag=True, help="Complete a run that was stopped; prompts and options must be the same.")
@click.pass_obj
def generate(debug, prompts, **options):
    """Make pictures of PROMPTS, running the early steps of similar prompts once.

    Writes FOLDER/index.html (a gallery), images/, manifest.jsonl, plan.json and report.json. Without --model the small
    emoji model that comes with the package draws.

    \b
    Examples:
      sage generate prompts.txt --out pictures
      sage generate prompts.txt --out pictures --compare         with and without sharing, side by side
      sage generate prompts.txt --out pictures --share 0.3 --images-per-prompt 4
      sage generate prompts.txt --out pictures --budget 0.6      at most 60 % of the rows, as a tree
      sage generate prompts.txt --out pictures --model ./sd15 --solver dpm++2m --steps 20 --seed 7
      sage generate prompts.txt --out pictures --resume          after an interruption

    \b
    Exit codes:
      0  done                        2  prompts, options or files cannot be used
      1  something failed          130  interrupted; --resume completes the run
    """
    with _clean_errors(debug):
        from sage.commands import Generation, Request
        from sage.planning import Grouping

        grouping = Grouping.from_options(**{name: options.pop(name) for name in OF_GROUPING})
        generation = Generation(Request(grouping=grouping, **options), prompts, _say, progress=sys.stderr.isatty())
        try:
            report = generation.run()
        except (Exception, KeyboardInterrupt):
            if generation.written:
                _say(f"Stopped: {count(generation.written, 'picture')} finished in {options['out']}; --resume makes the rest.")
            raise
        click.echo(saving_sentence(report) if generation.written else "Every picture was there already.")
        click.echo(f"Gallery: {generation.gallery}")


@cli.command()
@evaluate_options
@click.pass_obj
def evaluate(debug, prompts, table, steps, comfortable, shares, budgets, **options):
    """Say what sharing costs in quality on PROMPTS, always beside fewer steps.

    Draws the prompts that have a neighbour by every method, with the same seeds. Costs are measured from the knee: the least steps
    at which independent sampling is as good as at its best, within --margin. Without PROMPTS the embedded model's own benchmark is
    drawn, with its real pictures to compare with.

    Writes FOLDER/results.json, table.md, plot.png, sheets/ and methods/ with all pictures and their cost.

    \b
    Examples:
      sage evaluate --out quick --quick                          the embedded model, a few minutes
      sage evaluate --out evaluation --solver ddim --solver dpm++2m
      sage evaluate prompts.jsonl --out sd15 --model ./sd15 --extractor clip:openai/clip-vit-large-patch14 --images photos
      sage evaluate --out tuned --adapter group.safetensors --share 0.2,0.4 --method share --method fewer-steps
      sage evaluate --out evaluation --resume                    after an interruption
      sage evaluate --table evaluation/results.json              the table again

    \b
    Exit codes:
      0  done                        2  prompts, options or files cannot be used
      1  something failed          130  interrupted; --resume completes the run
    """
    with _clean_errors(debug):
        from sage.evaluation.request import Request, numbers

        if table is not None:
            from sage.evaluation.command import render

            click.echo(render(table, options["out"]))
            return
        if options["out"] is None:
            raise InputError("--out FOLDER must be given: pictures, table and plot go there.")
        lists = {"steps": numbers(steps, "--steps", int), "comfortable": numbers(comfortable, "--comfortable", int),
                 "shares": numbers(shares, "--share", float), "budgets": numbers(budgets, "--budget", float)}
        request = Request(**options, **lists)
        from sage.evaluation.command import Evaluation

        evaluation = Evaluation(request, prompts, _say, progress=sys.stderr.isatty())
        _run_evaluation(evaluation, options["out"])


def _run_evaluation(evaluation, out: str) -> None:
    """Draw and judge; the table is all that goes to standard output."""
    from sage.evaluation.report import short_table

    try:
        results = evaluation.run()
    except (Exception, KeyboardInterrupt):
        if evaluation.drawing:
            _say(f"Stopped; what is drawn stays in {out}, and --resume makes the rest.")
        raise
    click.echo(short_table(results))
    click.echo(f"Table, plot and pictures: {Path(out)}")


@cli.command()
@train_options
@click.pass_obj
def train(debug, **options):
    """Fine-tune a model for sharing, on pictures with captions.

    Similar captions are grouped as `sage generate` groups prompts. For the timesteps before the branch the model learns what a group
    has in common, under the mean of its members' conditions; for those after it, each picture under its own caption. A step costs
    what one of ordinary fine-tuning costs. Options are those of diffusers' train_text_to_image_lora.py, and a few more.

    Writes FOLDER/pytorch_lora_weights.safetensors (a LoRA for `sage generate --adapter`, `sage.load_adapter` and diffusers'
    `load_lora_weights`), checkpoint-N/, log.jsonl and training.json. Several devices: accelerate launch -m sage.cli train ...

    \b
    Examples:
      sage train --train_data_dir photos --model ./sd15 --out tuned
      sage train --train_data_dir photos --model ./sd15 --out tuned --mixed_precision bf16 --cache_latents --center_crop
                 --cache_text --max_train_steps 2000 --validation_prompt "a red fox" --validation_prompt "a grey fox"
      sage train --train_data_dir photos --model ./sd15 --out tuned --resume_from_checkpoint latest    after an interruption
      sage train --train_data_dir photos --model ./sd15 --out plain --soft_target none                 to compare with
      sage generate prompts.txt --out pictures --model ./sd15 --adapter tuned

    \b
    Exit codes:
      0  done                        2  data, options or files cannot be used
      1  something failed          130  interrupted; --resume_from_checkpoint latest goes on
    """
    with _clean_errors(debug):
        from sage.training.command import train as run
        from sage.training.options import TrainOptions

        record = run(TrainOptions(**options), _say, progress=sys.stderr.isatty())
        if record is not None:
            click.echo(f"{record['steps']} steps in {record['seconds']:.0f} s: {Path(options['output_dir'])}")


def saving_sentence(report: dict) -> str:
    """One line on what the run cost and saved."""
    stats, unshared = report["stats"], report.get("unshared_stats") or {}
    if "nfe" not in stats:
        return "The pictures with sharing were there already; what they cost is not known."
    text = f"{stats['nfe']:,} denoiser rows instead of {stats['nfe_independent']:,}: {stats['saving']:.1%} saved"
    seconds, planning = stats["seconds"], report["seconds"]["planning"]
    if not unshared.get("seconds") or stats.get("kept") or unshared.get("kept"):
        return f"{text}; {seconds:.1f} s, {stats['images_per_second']:.2f} pictures/s."
    shared = seconds + planning
    change = f"{1 - shared / unshared['seconds']:.1%} saved" if shared < unshared["seconds"] else "no time saved"
    return f"{text}; {shared:.1f} s ({planning:.1f} s of it planning) instead of {unshared['seconds']:.1f} s: {change}."


@contextlib.contextmanager
def _clean_errors(debug: bool):
    """One paragraph instead of a traceback, and the exit code: 2 for input, 1 for failures, 130 when interrupted."""
    try:
        yield
    except (click.exceptions.Exit, click.ClickException, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        _say("Interrupted.")
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        if debug:
            traceback.print_exc()
        wrong_input = isinstance(error, InputError)
        text = " ".join(str(error).split()) or type(error).__name__
        prefix = "" if wrong_input else f"{type(error).__name__}: "
        hint = "" if wrong_input or debug else "\nRun `sage --debug …` to see where."
        click.echo(f"Error: {prefix}{text}{hint}", err=True)
        sys.exit(EXIT_INPUT if wrong_input else EXIT_FAILURE)


def _check_apart(written: dict[str, str | None], read: dict[str, str | None]) -> None:
    """Refuse to write a file over one that is read, or two into one."""
    named = {name: Path(file).resolve() for name, file in {**read, **written}.items() if file not in (None, "-")}
    for name, file in named.items():
        other = next((other for other in named if other != name and named[other] == file), None)
        if name in written and other is not None:
            raise InputError(f"{name} {written[name]}: {other} is the same file; give another name.")


def _check_file(file: str | None, endings: tuple[str, ...] = ()) -> None:
    """Refuse a file to be written whose folder is missing, that is a folder itself, or whose name ends otherwise."""
    if file is None:
        return
    if Path(file).is_dir():
        raise InputError(f"{file}: this is a folder; give the name of a file.")
    if not Path(file).absolute().parent.is_dir():
        raise InputError(f"{file}: the folder {Path(file).parent} does not exist.")
    if endings and Path(file).suffix.lower() not in endings:
        raise InputError(f"{file}: the name must end in one of {', '.join(endings)}.")


def _say(text: str) -> None:
    click.echo(text, err=True)


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    _say(f"Warning: {message}")


def main() -> None:
    """Entry point of the `sage` command."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    warnings.showwarning = _show_warning
    warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")  # its successor is unknown to older diffusers
    cli()


if __name__ == "__main__":
    main()
