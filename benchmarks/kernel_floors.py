"""Predicted traffic of one `branch_step` on a GPU, and the least time it takes: arithmetic, nothing is measured.

    python benchmarks/kernel_floors.py --out benchmarks/results/kernel_floors.json

A launch is bound by memory: its floor is the compulsory bytes (each input read once, each output written once) over the rate of a
plain device copy. The rates are given, not measured here: a copy's bytes read plus bytes written per second on each card. A launch
itself takes some microseconds on the host, so below a number of rows the floor is not what one waits for.
"""

import argparse
import math

from harness import write_json
from ops_cases import BYTES_FORMULA, SIZES, Key, timed_calls, traffic
from readme_tables import markdown_table

COPY_TERABYTES_PER_SECOND = {"H100": 3.0, "H200": 4.3}
LAUNCH_MICROSECONDS = 5.0
SOLVERS, DTYPES, ROWS = ("ddim", "dpm++2m", "unipc"), ("bf16/fp32", "bf16"), 8


def line(solver, size, dtype):
    """One row of the table: bytes per latent and element, floors [us] for ROWS latents, rows from which a launch is hidden."""
    key = Key(solver, size, dtype, ROWS, 1)
    nbytes, elements = traffic(key, *timed_calls(solver)), math.prod(SIZES[size])
    floors = {card: nbytes / (rate * 1e6) for card, rate in COPY_TERABYTES_PER_SECOND.items()}
    hidden_from = {card: math.ceil(LAUNCH_MICROSECONDS * ROWS / floor) for card, floor in floors.items()}
    values = [solver, size, elements, dtype, nbytes / ROWS / elements, nbytes / 1e6]
    return [*values, *floors.values(), *hidden_from.values()]


def table():
    cards = COPY_TERABYTES_PER_SECOND
    columns = ["solver", "size", "D", "model/state", "bytes per element", f"MB, {ROWS} rows"]
    columns += [f"{card} floor, us" for card in cards] + [f"{card}: launch hidden from rows" for card in cards]
    rows = [line(solver, size, dtype) for dtype in DTYPES for solver in SOLVERS for size in SIZES]
    return {"columns": columns, "rows": rows, "formats": [None, None, ",", None, ".0f", ".1f", ".1f", ".1f", None, None]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=None, help="JSON to write")
    args = parser.parse_args()
    print(markdown_table(**table()))
    if args.out:
        assumed = {"copy_terabytes_per_second": COPY_TERABYTES_PER_SECOND, "launch_microseconds": LAUNCH_MICROSECONDS}
        write_json(args.out, {"command": f"python benchmarks/kernel_floors.py --out {args.out}", "bytes": BYTES_FORMULA} | assumed | {"table": table()})


if __name__ == "__main__":
    main()
