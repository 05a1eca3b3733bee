"""The `sage` command: info, plan, generate. Heavy imports wait until a command needs them."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
import warnings
from pathlib import Path

import click

from sage.prompts import InputError, count, read_prompts
from sage_kernels.version import __version__

EXIT_INPUT, EXIT_FAILURE, EXIT_INTERRUPTED = 2, 1, 130
PLOTS = (".png", ".svg", ".pdf")

GROUPING_OPTIONS = (
    click.option("--share", default=0.4, show_default=True, help="Fraction of the calls that a group shares, 0 to 1."),
    click.option("--similarity", default=0.6, show_default=True, help="Least cosine between any two prompts of a group."),
    click.option("--max-group-size", default=8, show_default=True, help="Most prompts in a group."),
    click.option("--images-per-prompt", default=1, show_default=True, help="Pictures of each prompt."),
    click.option(
        "--encoder",
        default="auto",
        show_default=True,
        help="What compares prompts: auto (comes with the package), pipeline (the model's own text encoder), or the folder "
        "or hub id of a sentence encoder.",
    ),
    click.option("--model", metavar="ID|FOLDER", help="A diffusers model in safetensors. Default: the embedded emoji model."),
    click.option("--device", help="cpu, cuda, cuda:1 … Default: a GPU when there is one."),
    click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Default: float16 on GPUs."),
)


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
      sage generate prompts.txt --out pictures --model FOLDER --solver dpm++2m --steps 20

    PROMPTS is a text file with one prompt per line, a .jsonl file with {"prompt": …} and, if wanted, "negative_prompt"
    and "seed" per line, or - for standard input.
    """
    context.obj = debug


@cli.command()
@click.option("--schedulers", is_flag=True, help="List solver names, and which diffusers schedulers have a fast path.")
@click.pass_obj
def info(debug: bool, schedulers: bool):
    """Show versions, devices, kernel backends, build and model.

    \b
    Examples:
      sage info                 what is installed, and why a backend cannot run
      sage info --schedulers    names for --solver
    """
    with _clean_errors(debug):
        from sage.info import info_text, schedulers_text

        click.echo(schedulers_text() if schedulers else info_text())


@cli.command()
@click.argument("prompts")
@grouping_options
@click.option("--steps", default=20, show_default=True, help="Denoiser calls to count the saving for.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@click.option("--out", metavar="FILE", help="Save the plan; `sage generate --plan FILE` follows it.")
@click.option("--plot", metavar="FILE", help="Draw the plan into a .png, .svg or .pdf file.")
@click.option("--all", "show_all", is_flag=True, help="List every group; without it the first 20.")
@click.pass_obj
def plan(debug, prompts, steps, as_json, out, plot, show_all, model, device, dtype, **grouping):
    """Group PROMPTS and show what sharing would save. No picture is made.

    \b
    Examples:
      sage plan prompts.txt
      sage plan prompts.txt --similarity 0.7 --share 0.3
      sage plan prompts.jsonl --out plan.json --plot plan.png
      grep fox prompts.txt | sage plan - --json
    """
    with _clean_errors(debug):
        from sage.loading import check_device, check_model, load_model
        from sage.planning import Grouping, make_plan, plan_summary, plan_text

        request = Grouping(**grouping)
        request.check()
        if steps < 1:
            raise InputError(f"--steps must be at least 1, got {steps}.")
        for file in (out, plot):
            _check_file(file)
        if plot is not None and Path(plot).suffix.lower() not in PLOTS:
            raise InputError(f"--plot {plot}: the name must end in one of {', '.join(PLOTS)}.")
        read = read_prompts(prompts)
        check_model(model)
        check_device(device)
        for remark in read.remarks():
            _say(remark)
        pipe = load_model(model, device, dtype) if request.encoder == "pipeline" else None
        made, _ = make_plan(read, request, pipe)
        if out is not None:
            from sage.output import write_atomic

            write_atomic(Path(out), made.to_json() + "\n")
        if plot is not None:
            made.plot(plot, num_calls=steps)
        click.echo(json.dumps(plan_summary(made, steps), ensure_ascii=False, indent=1) if as_json
                   else plan_text(made, steps, None if show_all else 20))  # fmt: skip


@cli.command()
@click.argument("prompts")
@click.option("--out", required=True, metavar="FOLDER", help="Where pictures, manifest, plan, report and gallery go.")
@grouping_options
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
def generate(debug, prompts, share, similarity, max_group_size, images_per_prompt, encoder, **options):
    """Make pictures of PROMPTS, running the early steps of similar prompts once.

    Writes FOLDER/index.html (a gallery), images/, manifest.jsonl, plan.json and report.json. Without --model the small
    emoji model that comes with the package draws.

    \b
    Examples:
      sage generate prompts.txt --out pictures
      sage generate prompts.txt --out pictures --compare         with and without sharing, side by side
      sage generate prompts.txt --out pictures --share 0.3 --images-per-prompt 4
      sage generate prompts.txt --out pictures --model ./sd15 --solver dpm++2m --steps 20 --seed 7
      sage generate prompts.txt --out pictures --resume          after an interruption
    """
    with _clean_errors(debug):
        from sage.commands import Generation, Request
        from sage.planning import Grouping

        grouping = Grouping(share, similarity, max_group_size, images_per_prompt, encoder)
        generation = Generation(Request(grouping=grouping, **options), prompts, _say, progress=sys.stderr.isatty())
        try:
            report = generation.run()
        except (Exception, KeyboardInterrupt):
            if generation.written:
                _say(f"Stopped: {count(generation.written, 'picture')} finished in {options['out']}; --resume makes the rest.")
            raise
        click.echo(saving_sentence(report) if generation.written else "Every picture was there already.")
        click.echo(f"Gallery: {generation.gallery}")


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


def _check_file(file: str | None) -> None:
    """Refuse a file to be written whose folder is missing, or that is a folder itself."""
    if file is not None and Path(file).is_dir():
        raise InputError(f"{file}: this is a folder; give the name of a file.")
    if file is not None and not Path(file).absolute().parent.is_dir():
        raise InputError(f"{file}: the folder {Path(file).parent} does not exist.")


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
