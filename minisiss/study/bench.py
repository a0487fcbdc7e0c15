"""What a step costs in time and memory on this machine. What is compared takes turns: noise hits all alike.

    python -m minisiss.study.bench [--scaling]              some 10 minutes on two CPU cores
"""

import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from minisiss.errors import UserError, of_torchrun
from minisiss.machine import ranks
from minisiss.machine.command_line import Parser, batch_size, filename, number, positive_int, run
from minisiss.machine.device import pick_device
from minisiss.machine.ranks import ALONE, World
from minisiss.report.table import aligned
from minisiss.runs.directory import write_json
from minisiss.study.workload import BATCH_SIZES, NAIVE, STEPS, Workload

SECONDS = 75  # for one table, in which at least one round is timed
DDIM_STEPS = 50  # of one sample
Rows = list[dict[str, Any]]


def measure(title: str, calls: dict[tuple, Callable[[int], Any]], repeats: int, device: torch.device,
            world: World = ALONE) -> dict[tuple, list[float]]:
    """Seconds of each call in each of `repeats` rounds, or as many as end within `SECONDS`, but at least one.

    The calls take turns; round 0 warms up and is not counted. SISS is called twice a round and timed the
    second time: its passes have other sizes each round, and a size is slow when it is met first.
    """

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    times, began = {key: [] for key in calls}, clock()
    for round in tqdm(range(repeats + 1), desc=title, unit="round", leave=False):
        for key, call in calls.items():
            if "siss" in key:
                call(round)
            start = clock()
            call(round)
            if round:
                times[key].append(clock() - start)
        if round and world.max((clock() - began) * (round + 2) / (round + 1) > SECONDS):
            break
    return times


def peak_bytes(device: torch.device) -> int:
    """The most memory so far: allocated on a GPU, or resident of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # the system's record of this very program; the portable one can start from its parent's
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_of_two_steps(args: Namespace, preset: str, name: str) -> dict[str, float]:
    """MiB at the peak of two steps (the first makes AdamW's state), and how many the steps added.

    A process has only one peak, so this is for a process of its own.
    """
    work = Workload(args, preset)
    before = peak_bytes(work.device)
    for round in (0, 1):
        work.step(name, round)
    peak = peak_bytes(work.device)
    return {"peak MiB": peak / 2**20, "step MiB": (peak - before) / 2**20}


def peaks(args: Namespace, preset: str) -> dict[str, dict[str, float]]:
    """`peak_of_two_steps` of every method."""
    context, found = multiprocessing.get_context("forkserver"), {}
    context.set_forkserver_preload(["minisiss.study.workload"])  # torch is imported once for all of them
    for name in tqdm(STEPS, desc="peaks of memory", unit="process", leave=False):
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            found[name] = pool.submit(peak_of_two_steps, args, preset, name).result()
    return found


def steps(work: Workload, peaks: dict[str, dict[str, float]], repeats: int) -> Rows:
    """A step of every method on the same batches; "× naive": the median of the rounds' ratios."""
    times = measure("steps", {(name,): partial(work.step, name) for name in STEPS}, repeats, work.device)
    rows = []
    for (name,), rounds in times.items():
        ratio = median(this / naive for this, naive in zip(rounds, times[NAIVE,], strict=True))
        row = {"step": name, "seconds": median(rounds), "× naive": ratio}
        rows.append(row | peaks[name] | {"rounds": rounds})
    return rows


def overlap(work: Workload, rounds: int) -> float:
    """The share of images that count in both terms of SISS, over the rounds that are timed."""
    terms = [work.terms("siss", round) for round in range(1, rounds + 1)]
    return torch.stack([(t.keep.counts & t.forget.counts).float().mean() for t in terms]).mean().item()


def variants(work: Workload, compiled: bool) -> dict[str, Workload]:
    """The network by precision, and compiled if that is asked for."""
    found = {precision: work.at(precision) for precision in ("fp32", "bf16")}
    return found | ({f"{name}, compiled": work.at(name, compiled=True) for name in found} if compiled else {})


def throughput(networks: dict[str, Workload], repeats: int, first: int, method: str = NAIVE) -> Rows:
    """Images/s of all ranks together, in steps of a method and sampled (of which the `first` steps run)."""
    calls = {}
    for name, work in networks.items():
        calls |= {(name, method): partial(work.step, method), (name, ""): partial(work.sample, first)}
    times, rows = measure("throughput", calls, repeats, work.device, work.world), []
    for name in networks:
        images = work.world.size * work.batch_size
        train, sample = images / median(times[name, method]), images / median(times[name, ""])
        sampling = {f"sampling images/s, {DDIM_STEPS} steps": sample * first / DDIM_STEPS}
        rows.append({"network": name, "training images/s": train, **sampling})
    return rows


def scaling(args: Namespace, presets: list[str], device: torch.device) -> dict[str, Rows]:
    """Weak scaling: images/s of 1 to N ranks, GPUs or threads of a CPU, each with a batch of its own.

    Efficiency is the rate of a rank among N over that of a rank among the fewest. torchrun starts the ranks
    on this same command.
    """
    if device.type == "mps":
        raise UserError(f"--scaling: several ranks cannot share {device}; use --device cpu")
    most = torch.cuda.device_count() if device.type == "cuda" else 2
    tables = {preset: [] for preset in presets}
    counts = sorted(args.scaling) or [*(n for n in (1, 2, 4, 8) if n < most), most]
    for count in tqdm(counts, desc="scaling", unit="torchrun"):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "rates.json"
            torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)
            script = "-m", "minisiss.study.bench", *sys.argv[1:], "--out", str(out)
            environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
            command = sys.executable, *torchrun, *script
            if subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode:
                raise UserError(f"--scaling {count}: failed, for the reason above")
            found = json.loads(out.read_text())
        for preset, rate in found.items():
            row = {"ranks": count, **rate}
            first = tables[preset][0] if tables[preset] else row
            for what in rate:
                row[f"efficiency in {what}"] = rate[what] / count / (first[what] / first["ranks"])
            tables[preset].append(row)
    for preset, rows in tables.items():
        show(f"{preset}, images/s of all ranks together:", rows)
    return tables


def show(title: str, rows: Rows) -> None:
    """Print a table: a column for each key; lists are for the JSON file only."""

    def text(value: Any) -> str:
        return f"{value:{',.0f' if value >= 100 else '#.3g'}}" if isinstance(value, float) else str(value)

    names = [name for name, value in rows[0].items() if not isinstance(value, list)]
    print(f"{title}\n\n{aligned([names, *([text(row[name]) for name in names] for row in rows)])}\n")


def benchmark(args: Namespace, preset: str) -> dict[str, Any]:
    """All tables of a preset, printed as they come."""
    most = peaks(args, preset)  # first, while this process holds nothing on the device
    work = Workload(args, preset)
    about = {"channels": work.config.channels, "parameters": sum(p.numel() for p in work.model.parameters()),
             "pictures": "×".join(map(str, work.config.image_shape)), "batch": work.batch_size,
             "precision": args.precision}
    methods = steps(work, most, args.repeats)
    show(f"{preset}: {', '.join(f'{name} {value}' for name, value in about.items())}", methods)
    shared = overlap(work, len(methods[0]["rounds"]))
    networks = throughput(variants(work, args.compile), args.repeats, 2 if args.quick else 5)
    both = f"{shared:.0%} of the images count in both of siss's terms"
    show(f"{both}: by their number, {1 + shared:.2f} × naive", networks)
    return about | {"overlap": shared, "steps": methods, "throughput": networks}


def parse_arguments() -> Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--presets", nargs="+", choices=BATCH_SIZES,
        help="networks (default: mnist-small mnist celebahq, the last an eighth as wide on a CPU)")
    add("--repeats", type=positive_int, default=5, help=f"timed rounds a table, at most {SECONDS} seconds")
    add("--quick", action="store_true", help="one round, of mnist-tiny unless --presets says otherwise")
    add("--batch-size", type=batch_size, help="images a step (default: by preset and machine)")
    add("--scaling", type=number(int, 1, 1024), nargs="*", metavar="N",
        help="instead: images/s on N GPUs, or threads of a CPU (default: 1 to all GPUs; 1 and 2 threads)")
    add("--data-root", type=filename, help="a folder of pictures for celebahq (default: smooth random ones)")
    parser.add_machine()
    add("--out", type=filename, default="bench.json", help="the JSON file to write")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    device, out = pick_device(args.device), Path(args.out)
    args.repeats = 1 if args.quick else args.repeats
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: should be a file, in a directory that exists")
    presets = args.presets or (["mnist-tiny"] if args.quick else ["mnist-small", "mnist", "celebahq"])
    if args.scaling is not None and of_torchrun("WORLD_SIZE", 0):  # one of the ranks that `scaling` starts
        world = ranks.start(device)
        found = {}
        for preset in presets:
            (row,) = throughput({preset: Workload(args, preset, world)}, args.repeats, 5, "siss")
            found[preset] = dict(zip(("siss", "sampling"), list(row.values())[1:], strict=True))
        world.on_rank_0(lambda: write_json(out, found))
        return 0
    kind = f"CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
    other = f"{platform.machine()} {kind}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else other
    results = {"torch": str(torch.__version__), "device": name, "presets": {}}
    print(f"torch {torch.__version__}, {name}\n")
    if args.scaling is not None:
        results["scaling"], presets = scaling(args, presets, device), []
    for preset in presets:
        try:
            results["presets"][preset] = benchmark(args, preset)
        except BrokenProcessPool as error:  # the system ends a process that takes too much
            raise UserError(f"{preset}: out of memory; try a smaller --batch-size ({error})") from error
        write_json(out, results)
        torch.cuda.empty_cache()
    write_json(out, results)
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    run(main)
