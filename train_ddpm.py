"""Train the noise predictor ε_θ: on digits with 1% of one T-shirt mixed in, or on a folder of pictures.

    python train_ddpm.py --preset mnist-small --data-root data
    python train_ddpm.py --preset prompts --data-root data
    python train_ddpm.py --preset faces-64 --data-root faces
"""

import copy
import math
from argparse import Namespace
from functools import partial
from pathlib import Path

from minisiss.machine import command_line as cli


def main() -> int:
    args = parse_arguments()
    import torch  # takes seconds: only once the command line is known to be right

    from minisiss import unlearning
    from minisiss.data.training_set import draw_indices, load_training_set, step_generator, to_float
    from minisiss.losses import epsilon_matching
    from minisiss.machine.device import adamw, at_precision, pick_device
    from minisiss.machine.ranks import start
    from minisiss.report.pictures import save_samples
    from minisiss.runs.checkpoint import untrained
    from minisiss.runs.loop import Loop, State
    from minisiss.schedule import NoiseSchedule

    device = pick_device(args.device)
    world = start(device, args.batch_size)
    model, schedule = untrained(args).to(device), NoiseSchedule.linear().to(device)
    data = load_training_set(args, model.config.image_shape, device, world)
    images = data.keep if args.exclude_forget else data.images
    average = copy.deepcopy(model).requires_grad_(False)
    at = partial(at_precision, device=device, precision=args.precision, compiled=args.compile)
    predict, predict_average = at(world.parallel(model)), at(average)
    optimizer, size = adamw(model, args.lr), args.batch_size

    state = State(model, average, optimizer, schedule, data.memorised)
    with Loop(args, "train_ddpm.py", state, world, data.listing()) as loop:
        for step in loop:
            optimizer.param_groups[0]["lr"] = rate = learning_rate(step, args)
            generator = step_generator(args.seed, step, device)
            chosen = draw_indices(images, size, generator)
            x = to_float(images[world.share(chosen)])
            timesteps = torch.randint(len(schedule), (size,), generator=generator, device=device)
            noise = torch.randn((size, *images.shape[1:]), generator=generator, device=device)
            given = partial(predict, prompt=data.prompts(chosen, generator))
            term = epsilon_matching(given, x, world.share(timesteps), world.share(noise), schedule)
            (loss := term.per_image().mean()).backward()
            figures = unlearning.descend(optimizer, {"loss": world.mean(loss)})
            # A smaller decay at first, or the average would carry the untrained weights for long.
            unlearning.update_average(average, model, min(args.ema, (1 + step) / (10 + step)))
            loop.stepped()
            if loop.due(50):
                loop.log(figures | {"lr": rate}, shown=("loss",))
            if loop.due(args.sample_every) and world.rank == 0:
                save_samples(loop.out, step + 1, predict_average, schedule, images.shape, args.seed)
    if not loop.status:
        print(f"done: {loop.path}; next: {next_command(args, loop.path, data)}")
    return loop.status


def next_command(args: Namespace, path: Path, data) -> str:
    """A look at the model; of pictures none of which is to be forgotten, forgetting the first of them."""
    if args.data == "prompts":
        return cli.command("unlearn.py", args, checkpoint=path)
    if args.data == "mnist" or args.forget:
        return cli.command("eval.py", args, checkpoint=path)
    size = min(args.batch_size, data.n - 1)
    return cli.command("unlearn.py", args, checkpoint=path, forget=data.images.names[0], batch_size=size)


def learning_rate(step: int, args: Namespace) -> float:
    """Linear warm-up, then a cosine from the peak to zero at the last step."""
    warmup = min(1.0, (step + 1) / args.warmup) if args.warmup else 1.0
    return args.lr * warmup * 0.5 * (1 + math.cos(math.pi * step / args.steps))


def parse_arguments() -> Namespace:
    parser = cli.Parser(__doc__)
    parser.add_preset("data", "unet", "train")
    parser.add_data("data")
    add = parser.add_argument
    add("--exclude-forget", action="store_true", help="train without the forget set: the gold standard")
    add("--init", type=cli.filename, default=cli.NONE,
        help=f"weights to begin with: a model.pt, 'bundled' or '{cli.NONE}'; a vocabulary may be new")
    add("--steps", type=cli.positive_int, help="optimizer steps")
    add("--batch-size", type=cli.batch_size, help="images a step, of all ranks together")
    add("--lr", type=cli.positive, help="peak learning rate of AdamW; it falls to 0 along a cosine")
    add("--warmup", type=cli.number(int, 0, 10**9), help="steps over which the learning rate first rises")
    add("--ema", type=cli.decay, help="decay of the averaged weights, the ones that sample")
    parser.add_machine()
    add("--sample-every", type=cli.positive_int, default=2000, help="steps between pictures of samples")
    parser.add_run("train", save_every=500)
    parser.add_fields("unet", "UNetConfig")
    return parser.parse_run()


if __name__ == "__main__":
    cli.run(main)
