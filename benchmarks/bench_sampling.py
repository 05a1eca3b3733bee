"""Whole sampling loops with a Stable Diffusion 1.5-size U-Net: diffusers' against `sage.sample`, without graphs and with.

    python benchmarks/bench_sampling.py --device cuda --out sampling.json     bf16 on a GPU, 1 2 4 8 pictures at once
    python benchmarks/bench_sampling.py --device cpu --quick                  a tiny U-Net, no graphs: a minute's look

The weights are random, built from a configuration: nothing is downloaded, and no loop shares anything, so that all make the same
pictures with the same denoiser calls. What differs is what lies between two calls:

  diffusers   scale_model_input, torch.cat, U-Net, guidance, scheduler.step
  sage        U-Net, one branch_step
  graphs      the same with the U-Net's launches replayed as CUDA graphs (a `sage.CapturedDenoiser` kept from run to run)

Before anything is timed, the latents must agree: all loops are compared with diffusers' loop in a wider state, and ours may be at most
twice as far from it as diffusers' own, plus a rounding. Times are wall times of a whole loop, the device drained before and
after, contenders in turn. `between` is what a loop costs with a denoiser that does nothing: microseconds of the host per call, and on
a GPU launches per call.
"""

import argparse
import copy
import sys

import diffusers
import torch
from harness import environment, host_sampler, in_turn, ratio, short, spread, synchronize, write_json
from readme_tables import markdown_table

import sage
from sage.solvers import SOLVERS

SD15 = {"sample_size": 64, "cross_attention_dim": 768}  # the rest are UNet2DConditionModel's defaults
TINY = {
    "sample_size": 16,
    "cross_attention_dim": 32,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
SCHEDULE = {  # Stable Diffusion's; with v_prediction the latents of a random model stay of order one
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
}
GUIDANCE = 7.5
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 2**-7}  # of the largest latent, carried through all steps


class Loops:
    """The contenders on one set of inputs: each call runs a whole loop and returns the latents."""

    def __init__(self, unet, rows, solver, steps):
        config, weight = unet.config, next(unet.parameters())
        draw = torch.Generator().manual_seed(0)
        randn = lambda *size: torch.randn(*size, generator=draw).to(weight)  # noqa: E731
        name, overrides = SOLVERS[solver]
        self.scheduler = getattr(diffusers, name)(**SCHEDULE, **overrides)
        self.scheduler.set_timesteps(steps, device=weight.device)
        self.calls = len(sage.table_for(self.scheduler))
        self.x = randn(rows, config.in_channels, config.sample_size, config.sample_size)
        self.x = self.x * float(self.scheduler.init_noise_sigma)
        self.negative, self.condition = (randn(rows, 77, config.cross_attention_dim) for _ in range(2))
        self.plan = sage.SharingPlan.independent([sage.Leaf(f"picture {i}") for i in range(rows)])

    def diffusers(self, denoise, state=None):
        """As a Stable Diffusion pipeline loops; `state`: a wider dtype for the latents."""
        scheduler, conditions, model = copy.copy(self.scheduler), torch.cat([self.negative, self.condition]), self.x.dtype
        scheduler.set_timesteps(scheduler.num_inference_steps, device=self.x.device)
        x = self.x.to(state or model)
        for t in scheduler.timesteps:
            doubled = scheduler.scale_model_input(torch.cat([x, x]), t).to(model)
            uncond, cond = denoise(doubled, t, conditions).to(x.dtype).chunk(2)
            x = scheduler.step(uncond + GUIDANCE * (cond - uncond), t, x, return_dict=False)[0]
        return x

    def sage(self, denoise):
        """The same from a configured scheduler on: its timesteps and the table are made anew in every run, as by `diffusers`."""
        scheduler = copy.copy(self.scheduler)
        scheduler.set_timesteps(scheduler.num_inference_steps, device=self.x.device)
        return sage.sample(
            denoise, self.plan, sage.table_for(scheduler), self.x, self.condition,
            negative_conditions=self.negative, guidance_scale=GUIDANCE,
        )  # fmt: skip

    def check(self, contenders):
        """Raise AssertionError unless every loop ends at the same latents, as far as rounding lets it."""
        exact = contenders["diffusers"](state=torch.float32).double()
        error = {name: float((run().double() - exact).abs().max() / exact.abs().max()) for name, run in contenders.items()}
        allowed = 2 * error["diffusers"] + ROUNDING[self.x.dtype]
        wrong = [name for name, value in error.items() if not value <= allowed]
        if wrong:
            raise AssertionError(f"{len(self.x)} rows: {', '.join(wrong)} beyond {allowed:.1e} of diffusers' loop in float32: {error}")
        return {name: short(value) for name, value in error.items()}


def between(loops, denoise, device):
    """{"us", "launches"} per denoiser call of a loop whose denoiser only hands over an output that lies ready."""
    ready = denoise(torch.cat([loops.x, loops.x]), loops.scheduler.timesteps[0], torch.cat([loops.negative, loops.condition]))
    nothing = lambda *args: ready  # noqa: E731
    runs = {"diffusers": lambda: loops.diffusers(nothing), "sage": lambda: loops.sage(nothing)}
    seconds = in_turn({name: host_sampler(run, device) for name, run in runs.items()}, seconds=1.0)
    return {
        name: {"us": short(1e6 * spread(seconds[name])["median"] / loops.calls), "launches": launches(run, device, loops.calls)}
        for name, run in runs.items()
    }


def launches(run, device, calls):
    """Kernels and copies that the device runs per call, counted by torch.profiler; None on a CPU."""
    if torch.device(device).type == "cpu":
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        synchronize(device)
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return short(len(on_device) / calls)


def measure(unet, rows, args):
    """Check and time all loops at a number of rows; returns a line of the JSON."""
    loops = Loops(unet, rows, args.solver, args.steps)
    denoise = lambda model_input, timestep, conditions: unet(model_input, timestep, conditions, return_dict=False)[0]  # noqa: E731
    contenders = {"diffusers": lambda **state: loops.diffusers(denoise, **state), "sage": lambda: loops.sage(denoise)}
    if torch.device(args.device).type == "cuda":
        captured = sage.CapturedDenoiser(denoise)
        contenders["graphs"] = lambda: loops.sage(captured)
    errors = loops.check(contenders)
    if "graphs" in contenders and captured.refusal:
        raise AssertionError(f"the U-Net was not captured: {captured.refusal}")
    samplers = {name: host_sampler(run, args.device, settle=False) for name, run in contenders.items()}
    seconds = in_turn(samplers, seconds=args.seconds, least=5)
    return {
        "rows": rows,
        "error": errors,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "images_per_second": {name: short(rows / spread(values)["median"]) for name, values in seconds.items()},
        "ratio": {name: ratio(seconds, name, "diffusers") for name in contenders if name != "diffusers"},
        "between": between(loops, denoise, args.device),
        "raw_seconds": {name: [short(value) for value in values] for name, values in seconds.items()},
    }


def table(lines):
    """Images per second and times faster, for the README."""
    names = list(lines[0]["seconds"])
    faster = [name for name in names if name != "diffusers"]
    between = [f"{what} between calls, {name}" for what in ("us", "launches") for name in ("diffusers", "sage")]
    columns = ["pictures at once", *(f"{n}, images/s" for n in names), *(f"{n}, times faster" for n in faster), *between]
    rows = [
        [line["rows"], *line["images_per_second"].values(), *(line["ratio"][n]["median"] for n in faster)]
        + [line["between"][name][what] for what in ("us", "launches") for name in ("diffusers", "sage")]
        for line in lines
    ]
    formats = [None, *[".3g"] * len(names), *[".2f"] * len(faster), ".0f", ".0f", ".3g", ".3g"]
    return {"columns": columns, "rows": rows, "formats": formats}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu (float32, no graphs) or cuda (bfloat16) (default: cpu)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N", help="pictures at once (default: 1 2 4 8)")
    parser.add_argument("--steps", type=int, default=20, help="denoiser calls of a loop (default: 20)")
    parser.add_argument("--solver", default="dpm++2m", choices=[n for n in SOLVERS if n not in ("euler-a", "dpm++2m-sde", "ddpm", "lcm")],
                        metavar="NAME", help="a deterministic name of sage.solvers.SOLVERS (default: dpm++2m)")
    parser.add_argument("--seconds", type=float, default=15.0, help="about how long to time each number of rows (default: 15)")
    parser.add_argument("--quick", action="store_true", help="a tiny U-Net, 1 and 2 pictures, 5 steps")
    parser.add_argument("--out", default=None, help="JSON to write: environment, settings, table, raw samples")
    args = parser.parse_args()  # fmt: skip
    if args.quick:
        args.rows, args.steps, args.seconds = [1, 2], 5, 0.5
    torch.manual_seed(0)
    dtype = torch.bfloat16 if torch.device(args.device).type == "cuda" else torch.float32
    with torch.device(args.device):
        unet = torch.nn.Module.to(diffusers.UNet2DConditionModel(**(TINY if args.quick else SD15)), dtype).eval()
    lines = []
    with torch.no_grad():
        for rows in args.rows:
            print(f"{rows} at once", flush=True)
            lines.append(measure(unet, rows, args))
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    settings |= {"parameters": sum(p.numel() for p in unet.parameters()), "dtype": str(dtype)[6:], "guidance": GUIDANCE}
    result = {"environment": environment(args.device), "settings": settings, "lines": lines, "table": table(lines)}
    print(markdown_table(**result["table"]))
    if args.out:
        write_json(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
