"""What a step costs in time and memory, on this machine.

    python -m minisiss.study.bench                          three networks; some 10 minutes on two CPU cores
    python -m minisiss.study.bench --presets mnist-small    one of them
    python -m minisiss.study.bench --scaling                from one device to several: images a second, efficiency

Two tables a network: a step of every method against one of naive deletion; images a second in training and sampling.
What is compared takes turns, so that a noisy machine hits all alike.
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

from minisiss.errors import UserError
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
Times = dict[tuple, list[float]]


def measure(
    title: str, calls: dict[tuple, Callable[[int], None]], repeats: int, device: torch.device, world: World = ALONE
) -> Times:
    """Seconds of each call in each round. The calls take turns; round 0 warms up and is not counted.

    There are `repeats` rounds, or as many as end within `SECONDS`, but at least one. SISS is called twice a round and
    timed the second time: its passes have other sizes each round, a size is slower when it is met for the first time,
    and in a run of some length most have been met before.
    """

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    times = {key: [] for key in calls}
    began = clock()
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
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["minisiss.study.workload"])  # torch is imported once for all of them
    found = {}
    for name in tqdm(STEPS, desc="peaks of memory", unit="process", leave=False):
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            found[name] = pool.submit(peak_of_two_steps, args, preset, name).result()
    return found


def steps(work: Workload, peaks: dict[str, dict[str, float]], repeats: int) -> Rows:
    """A step of every method on the same batches; relative to naive deletion's time in the same round, the median."""
    times = measure("steps", {(name,): partial(work.step, name) for name in STEPS}, repeats, work.device)
    ratios = {
        name: median(this / naive for this, naive in zip(rounds, times[(NAIVE,)], strict=True))
        for (name,), rounds in times.items()
    }
    return [
        {"step": name, "seconds": median(rounds), "× naive": ratios[name], **peaks[name], "rounds": rounds}
        for (name,), rounds in times.items()
    ]


def overlap(work: Workload, rounds: int) -> float:
    """The share of images that count in both terms of SISS, over the rounds that are timed."""
    terms = [work.terms("siss", round) for round in range(1, rounds + 1)]
    return torch.stack([(t.keep.counts & t.forget.counts).float().mean() for t in terms]).mean().item()


def variants(work: Workload, compiled: bool) -> dict[str, Workload]:
    """The network by precision, and compiled if that is asked for."""
    found = {precision: work.at(precision) for precision in ("fp32", "bf16")}
    if compiled:
        found |= {f"{precision}, compiled": work.at(precision, compiled=True) for precision in found}
    return found


def throughput(networks: dict[str, Workload], repeats: int, first: int) -> Rows:
    """Images a second in training (steps of naive deletion) and in sampling (of which the `first` steps run)."""
    calls = {}
    for name, work in networks.items():
        calls |= {(name, "train"): partial(work.step, NAIVE), (name, "sample"): partial(work.sample, first)}
    times = measure("throughput", calls, repeats, work.device)
    rate = {key: work.batch_size / median(rounds) for key, rounds in times.items()}
    sampling = f"sampling images/s, {DDIM_STEPS} steps"
    return [
        {"network": name, "training images/s": rate[name, "train"], sampling: rate[name, "sample"] * first / DDIM_STEPS}
        for name in networks
    ]


def rates(args: Namespace, preset: str, world: World) -> dict[str, float]:
    """Images a second of all ranks together: in steps of SISS, and sampled (of which the first 5 steps run)."""
    work = Workload(args, preset, world)
    calls = {("siss",): partial(work.step, "siss"), ("sampling",): partial(work.sample, 5)}
    times = measure("rates", calls, args.repeats, work.device, world)
    rate = {name: world.size * work.batch_size / median(rounds) for (name,), rounds in times.items()}
    return rate | {"sampling": rate["sampling"] * 5 / DDIM_STEPS}


def scaling(args: Namespace, presets: list[str], device: torch.device) -> dict[str, Rows]:
    """Weak scaling: the `rates` of 1 to N ranks, GPUs or threads of a CPU, each with a batch of the preset's size.

    Efficiency is the rate of a rank among N over that of a rank among the fewest. torchrun starts each number of
    ranks, on this same command, which then measures its rates.
    """
    most = torch.cuda.device_count() if device.type == "cuda" else 2
    tables = {preset: [] for preset in presets}
    counts = sorted(args.scaling) or [*(n for n in (1, 2, 4, 8) if n < most), most]
    for count in tqdm(counts, desc="scaling", unit="torchrun"):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "rates.json"
            launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count))
            command = (sys.executable, *launcher, "-m", "minisiss.study.bench", *sys.argv[1:], "--out", str(out))
            environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
            if subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode:
                raise UserError(f"--scaling {count}: failed, for the reason above")
            found = json.loads(out.read_text())
        for preset, rate in found.items():
            first = (tables[preset] or [{"ranks": count, **rate}])[0]
            efficiency = {f"efficiency in {what}": rate[what] / count / (first[what] / first["ranks"]) for what in rate}
            tables[preset].append({"ranks": count, **rate, **efficiency})
    for preset, rows in tables.items():
        print(f"{preset}, images/s of all ranks together:\n")
        show(rows)
    return tables


def show(rows: Rows) -> None:
    """Print a table: a column for each key; lists are for the JSON file only."""

    def text(value: Any) -> str:
        return (f"{value:,.0f}" if value >= 100 else f"{value:#.3g}") if isinstance(value, float) else str(value)

    names = [name for name, value in rows[0].items() if not isinstance(value, list)]
    print(aligned([names, *([text(row[name]) for name in names] for row in rows)]) + "\n")


def benchmark(args: Namespace, preset: str) -> dict[str, Any]:
    """All tables of a preset, printed as they come."""
    most = peaks(args, preset)  # first, while this process holds nothing on the device
    work = Workload(args, preset)
    about = {
        "channels": work.config.channels, "parameters": sum(p.numel() for p in work.model.parameters()),
        "pictures": "×".join(map(str, work.config.image_shape)), "batch": work.batch_size, "precision": args.precision,
    }  # fmt: skip
    print(f"{preset}: {', '.join(f'{name} {value}' for name, value in about.items())}\n")
    show(a := steps(work, most, args.repeats))
    shared = overlap(work, len(a[0]["rounds"]))
    print(f"{shared:.0%} of the images count in both of siss's terms: by their number, {1 + shared:.2f} × naive\n")
    show(b := throughput(variants(work, args.compile), args.repeats, 2 if args.quick else 5))
    return about | {"overlap": shared, "steps": a, "throughput": b}


def parse_arguments() -> Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--presets", nargs="+", choices=BATCH_SIZES,
        help="networks (default: mnist-small mnist celebahq, the last an eighth as wide on a CPU)")
    add("--repeats", type=positive_int, default=5,
        help=f"timed rounds a table, or as many as end within {SECONDS} seconds")
    add("--quick", action="store_true", help="one round, of mnist-tiny unless --presets says otherwise: does it run?")
    add("--batch-size", type=batch_size, help="images a step (default: by preset and machine)")
    add("--scaling", type=number(int, 1, 1024), nargs="*", metavar="N",
        help="instead: images a second on so many GPUs, or threads of a CPU (default: 1 to all GPUs; 1 and 2 threads)")
    add("--data-root", type=filename, metavar="DIR",
        help="a folder of pictures for celebahq (default: smooth random ones)")
    parser.add_machine()
    add("--out", type=filename, default="bench.json", help="the JSON file to write")
    return parser.parse_args()  # fmt: skip


def main() -> int:
    args = parse_arguments()
    args.repeats = 1 if args.quick else args.repeats
    device, out = pick_device(args.device), Path(args.out)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: should be a file, in a directory that exists")
    presets = args.presets or (["mnist-tiny"] if args.quick else ["mnist-small", "mnist", "celebahq"])
    if args.scaling is not None and "RANK" in os.environ:  # one of the ranks that `scaling` starts
        world = ranks.start(device)
        found = {preset: rates(args, preset, world) for preset in presets}
        world.on_rank_0(lambda: write_json(out, found))
        return 0

    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    results = {"torch": str(torch.__version__), "device": name}
    print(f"torch {torch.__version__}, {name}\n")
    if args.scaling is not None:
        results["scaling"] = scaling(args, presets, device)
        presets = []
    results["presets"] = {}
    for preset in presets:
        try:
            results["presets"][preset] = benchmark(args, preset)
        except (torch.cuda.OutOfMemoryError, BrokenProcessPool) as error:
            raise UserError(f"{preset}: out of memory; try a smaller --batch-size ({error})") from error
        write_json(out, results)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    write_json(out, results)
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    run(main)
