"""What sharing saves on the clock.

    python benchmarks/bench_pipeline.py --out benchmarks/results/cpu_pipeline.json        the embedded model, on the CPU
    python benchmarks/bench_pipeline.py --models sdxl flux --device cuda --out gpu.json   models at their real sizes, on a GPU
    python benchmarks/bench_pipeline.py --models sd15 flux --quick                        the same in miniature: a look at it

embedded   The model that ships, clock and quality: every method draws one picture of each prompt with the same seeds, beside stock
           calls with as many denoiser rows, by fewer steps. Sharing groups the prompts by likeness.

sd15 sdxl sd3 flux wan
           Their sizes with random weights, made here and not downloaded: times, rows and memory only, the pictures mean nothing.
           First the stock loop looks for the fewest pictures per call that fill the device. Then all pictures are grouped, in groups
           of 4 and of 8, and every method draws them in turn: the stock loop, sharing inside the pipeline's own loop (the hook) for
           20, 40 and 60 % of the calls and as a tree, the native loop, CUDA graphs, torch.compile, and First Block Cache. No call
           of the denoiser has more rows than the stock loop's, so that seconds should fall as the denoiser rows do: the last column
           says whether a row costs at most 1.05 of what a row of the stock loop does.

A model and size ends when its --seconds are used up; methods that were not reached, or cannot run here, are listed with the reason.
The JSON is written after every model and size: with --resume, a call that was cut off goes on behind the last that was finished.
"""

import argparse
import sys
from pathlib import Path

import pipeline_embedded
import pipeline_random
import torch
from harness import write_json
from pipeline_models import MODELS
from readme_tables import markdown_table

ROOT = Path(__file__).resolve().parent.parent
SIZES = list(dict.fromkeys(size for model in MODELS.values() for size in model.sizes))
KINDS = ("shared", "tree", "native", "graphs", "compiled", "cached")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["embedded", *MODELS]
    made.add_argument("--models", nargs="+", choices=names, default=["embedded"], metavar="NAME",
                      help=f"{' '.join(names)} (default: embedded)")
    made.add_argument("--steps", type=int, default=None, help="denoiser calls of the unshortened methods (default: 20; other models: 10)")
    made.add_argument("--shares", type=float, nargs="+", default=None, metavar="SHARE",
                      help="fractions of the calls that groups share (default: 0.4; other models: 0.2 0.4 0.6)")
    made.add_argument("--repeats", type=int, default=5, help="timed runs of each method, in turn (default: 5)")
    made.add_argument("--threads", type=int, default=None, help="torch threads (default: torch's choice)")
    made.add_argument("--out", default=None, help="JSON to write")
    made.add_argument("--quick", action="store_true", help="everything small: seconds on a CPU")
    own = made.add_argument_group("embedded")
    own.add_argument("--prompts", default=str(ROOT / "examples" / "prompts.txt"), help="text file, a prompt per line")
    own.add_argument("--guidance-scale", type=float, default=2.5)
    own.add_argument("--solver", default=None, help="a name of sage.solvers.SOLVERS (default: the model's own)")
    other = made.add_argument_group("the other models")
    other.add_argument("--sizes", nargs="+", choices=SIZES, metavar="SIZE", help=f"{' '.join(SIZES)} (default: all that a model has)")
    other.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if there is a GPU")
    other.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="default: bfloat16 on a GPU, else float32")
    other.add_argument("--max-rows", type=int, help="rows of a denoiser call, guidance copies counted (default: found by trying)")
    other.add_argument("--groups", type=int, nargs="+", default=[4, 8], metavar="N", help="pictures in a group (default: 4 8)")
    other.add_argument("--only", nargs="+", choices=KINDS, metavar="KIND", help=f"beside stock: {' '.join(KINDS)} (default: all)")
    other.add_argument("--seconds", type=float, default=200.0, help="about how long the rounds of a model and size may take (default: 200)")
    other.add_argument("--compile", choices=["whole", "blocks"], default="whole",
                       help="what is compiled: the denoiser (default), or its repeated blocks, which takes less long")
    other.add_argument("--backend", default="inductor", help="of torch.compile (default: inductor; with --quick: eager, and blocks only)")
    other.add_argument("--cache-threshold", type=float, default=0.1, help="of First Block Cache (default: 0.1)")
    other.add_argument("--resume", action="store_true", help="measure only what --out does not hold of this device, program and settings")
    return made  # fmt: skip


def parse(words: list[str] | None = None) -> argparse.Namespace:
    made = parser()
    args = made.parse_args(words)
    args.embedded = args.models == ["embedded"]
    if not args.embedded and "embedded" in args.models:
        made.error("embedded goes alone: its JSON has other keys")
    if args.max_rows is not None and args.max_rows < 2:
        made.error("--max-rows must be at least 2, a picture with its guidance copy")
    if min(args.groups) < 2:
        made.error("--groups must be at least 2 pictures each")
    args.shares = args.shares or ([0.4] if args.embedded else [0.2, 0.4, 0.6])
    args.steps = args.steps or (20 if args.embedded else 10)
    args.dtype = args.dtype or ("bfloat16" if torch.device(args.device).type == "cuda" else "float32")
    if args.quick:
        args.repeats, args.steps, args.backend, args.compile = 1, 4 if args.embedded else 5, "eager", "blocks"
        args.sizes = None  # miniatures have a size of their own
    return args


def main(words: list[str] | None = None) -> int:
    args = parse(words)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.embedded:
        prompts = [line.strip() for line in Path(args.prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
        result = pipeline_embedded.run(args, prompts[:12] if args.quick else prompts)
    else:
        result = pipeline_random.run(args)
    if result["table"]["rows"]:
        print(markdown_table(**result["table"]))
    if args.out:
        write_json(args.out, result)
    if args.embedded:
        return 0
    broken = pipeline_random.failed(result)
    print(*pipeline_random.skipped(result), *broken, pipeline_random.NOTE, sep="\n")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
