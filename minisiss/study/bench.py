"""What a step of each method costs on this machine, beside a step of naive deletion.

    python -m minisiss.study.bench [--preset mnist] [--batch-size 8] [--compile]

Each cell is the median of five rounds, in which the methods take turns. One more round warms up.
"""

import time
from statistics import median

import torch

from minisiss.lab import machine
from minisiss.lab.cli import Parser, positive_int, run
from minisiss.lab.data import TrainingSet
from minisiss.lab.evaluation import aligned
from minisiss.lab.presets import PRESETS
from minisiss.schedule import NoiseSchedule
from minisiss.unet import UNet, UNetConfig
from minisiss.unlearning import METHODS, draw_batch, step


def main() -> int:
    parser = Parser(__doc__)
    parser.add_machine()
    parser.add_argument("--batch-size", type=positive_int, default=64, help="images per step")
    args = parser.parse()
    device = machine.start(args.device)
    schedule = NoiseSchedule.linear().to(device)
    model = UNet(UNetConfig(**PRESETS[args.preset]["unet"])).to(device)
    network = machine.at_precision(device, args.precision, args.compile)(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6, fused=True)
    images = torch.randint(256, (1000, *model.config.image_shape), dtype=torch.uint8)
    data = TrainingSet(images.to(device), k=10)
    settings = dict(lam=0.5, superfactor=9.0, subtract_until=1.0, draw_x="rest",
                    grad_ratio=1.0, nearest=data.nearest, old=network)

    generator = torch.Generator(device).manual_seed(args.seed)
    seconds = {name: [] for name in METHODS}
    for _ in range(1 + 5):
        for name, method in METHODS.items():
            batch = draw_batch(data, args.batch_size, schedule, generator)
            loss = method.loss_of(network, schedule, settings)
            start = time.perf_counter()
            figures = step(loss, batch, method.c_of(settings), optimizer)
            figures["norm"].item()  # a GPU has finished when the number is there
            seconds[name].append(time.perf_counter() - start)
    naive = median(seconds["naive_deletion"][1:])
    rows = [[f"{args.preset}, batches of {args.batch_size}", "seconds", "× naive deletion"]]
    for name, times in seconds.items():
        typical = median(times[1:])
        rows.append([name, f"{typical:.3f}", f"{typical / naive:.2f}"])
    print(aligned(rows))
    return 0


if __name__ == "__main__":
    run(main)
