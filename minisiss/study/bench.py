"""What a step costs on this machine: seconds, and times a step of naive deletion, in turns.

    python -m minisiss.study.bench [--preset mnist] [--compile]

The methods take turns, so what else the machine does hits all of them alike. Round 0 warms up.
"""

import time
from statistics import median

import torch

from minisiss.lab import ranks
from minisiss.lab.cli import Parser, positive_int, run
from minisiss.lab.data import TrainingSet, nearest_kept
from minisiss.lab.pictures import aligned
from minisiss.lab.precision import adamw, at_precision
from minisiss.lab.presets import PRESETS
from minisiss.schedule import NoiseSchedule
from minisiss.unet import UNet, UNetConfig
from minisiss.unlearning import METHODS, draw_batch, step

# By the name of a row: the method, and whether c is by norms or s is given.
ROWS = {"naive_deletion": None, "siss": None, "siss, s given": 9.0, "siss_no_is": None,
        "erasediff": None, "neggrad": None, "retrack": None, "old_targets": None}


def main() -> int:
    parser = Parser(__doc__, "bench")
    parser.add_machine()
    parser.add_argument("--batch-size", type=positive_int, default=64)
    parser.add_argument("--rounds", type=positive_int, default=5)
    args = parser.parse()
    device, schedule = ranks.start(args.device), NoiseSchedule.linear()
    schedule = schedule.to(device)
    model = UNet(UNetConfig(**PRESETS[args.preset]["unet"])).to(device)
    network = at_precision(model, device, args.precision, args.compile)
    images = torch.randint(256, (1000, *model.config.image_shape), dtype=torch.uint8)
    data, optimizer = TrainingSet(images.to(device), k=10), adamw(model, 1e-6)
    settings = dict(lam=0.5, grad_ratio=1.0, erasediff_eta=0.1, retrack_weight=0.005, draw_x="rest",
                    old_targets_weight=3.0, old=network, nearest=nearest_kept(data, 10))

    seconds: dict[str, list[float]] = {name: [] for name in ROWS}
    for number in range(args.rounds + 1):
        for name, superfactor in ROWS.items():
            row = METHODS[name.split(",")[0]]
            method_settings = settings | {"superfactor": superfactor}
            generator = torch.Generator(device).manual_seed(number)
            batch = draw_batch(data, args.batch_size, schedule, generator)
            loss = row.loss_of(network, schedule, method_settings)
            began = time.perf_counter()
            figures = step(loss, batch, row.c_of(method_settings), optimizer)
            figures["norm"].item()  # a GPU has finished when the number is there
            seconds[name].append(time.perf_counter() - began)
    rows = [["step", "seconds", "× naive deletion"]]
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds["naive_deletion"], strict=True)]
        rows.append([name, f"{median(times[1:]):.3f}", f"{median(ratios[1:]):.2f}"])
    print(f"{args.preset}, batches of {args.batch_size}, {device}, torch {torch.__version__}\n")
    print(aligned(rows))
    return 0


if __name__ == "__main__":
    run(main)
