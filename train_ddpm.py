"""Train the noise predictor ε_θ: on digits and copies of a T-shirt, or on a folder of pictures.

    python train_ddpm.py --preset mnist-small --data-root data
    python train_ddpm.py --preset faces-64 --data-root faces
"""

import copy
from argparse import Namespace
from functools import partial

from minisiss.lab.cli import Parser, UserError, decay, number, positive, positive_int, run
from minisiss.lab.presets import PRESETS


def main() -> int:
    args = parse_arguments()
    # These import torch, which takes seconds: the command line is checked first.
    import torch

    from minisiss.lab import before_after, data, machine, metrics
    from minisiss.lab.run import Run
    from minisiss.losses import naive_deletion
    from minisiss.schedule import NoiseSchedule
    from minisiss.unet import UNet, UNetConfig
    from minisiss.unlearning import draw_batch, learning_rate, step, update_average

    device = machine.start(args.device)
    schedule = NoiseSchedule.linear().to(device)
    torch.manual_seed(args.seed)
    model = UNet(UNetConfig(**PRESETS[args.preset]["unet"])).to(device)  # takes the steps
    average = copy.deepcopy(model).requires_grad_(False)  # of the weights
    at = machine.at_precision(device, args.precision, args.compile)
    network, shape = at(model), model.config.image_shape
    training_set = data.load_training_set(args, shape, device)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, fused=True)
    loss = partial(naive_deletion, network, schedule=schedule)  # ε-matching
    draw_x = "rest" if args.exclude_forget else "all"
    with Run(args, model, average, optimizer, schedule, training_set) as this_run:
        for taken in this_run:  # steps taken so far
            generator = data.step_generator(args.seed, taken, device)
            batch = draw_batch(training_set, args.batch_size, schedule, generator, draw_x)
            optimizer.param_groups[0]["lr"] = learning_rate(taken, args.steps, args.lr, args.warmup)
            figures = step(loss, batch, 0.0, optimizer)
            update_average(average, model, args.ema, taken)
            this_run.log({"loss": figures["loss_keep"]}, every=50, shown=("loss",))
            if this_run.due(args.sample_every):
                places, path = list(range(64)), this_run.out / f"samples-{this_run.step:06d}.png"
                samples = metrics.draw_samples(at(average), schedule, places, shape, args.seed, 25)
                if machine.rank() == 0:
                    before_after.grid(samples, columns=8).save(path)
    if not this_run.status:
        print(f"done: {this_run.path}; next: python unlearn.py --checkpoint {this_run.path}")
    machine.leave()
    return this_run.status


def parse_arguments() -> Namespace:
    parser = Parser(__doc__, "all", "train")
    parser.add_data("data")
    add = parser.add_argument
    add("--exclude-forget", action="store_true", help="train without A: the gold standard")
    add("--steps", type=positive_int, default=20, help="optimizer steps")
    add("--batch-size", type=positive_int, default=64, help="images per step")
    add("--lr", type=positive, default=1e-3, help="peak learning rate of AdamW")
    add("--warmup", type=number(int, 0, 10**9), default=0, help="steps of a rising rate")
    add("--ema", type=decay, default=0.999, help="decay of the averaged weights")
    add("--sample-every", type=positive_int, default=2000, help="steps between samples")
    parser.add_machine()
    parser.add_run("train", save_every=500)
    args = parser.parse()
    if "unet" not in PRESETS[args.preset]:
        raise UserError(f"--preset {args.preset}: is for unlearn.py")
    return args


if __name__ == "__main__":
    run(main)
