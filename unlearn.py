"""Make a trained model forget the T-shirt and keep the digits, or forget pictures of a folder.

    python unlearn.py                            SISS on the bundled model
    python unlearn.py --method naive_deletion    or siss_no_is, neggrad, erasediff, …
    python unlearn.py --preset prompts           what a prompt brings back
    python unlearn.py --preset celebahq --data-root faces/ --forget 10000.jpg
"""

import copy
from argparse import Namespace
from typing import Any

from minisiss.lab.cli import Parser, UserError, decay, number, positive, positive_int, run


def main() -> int:
    args = parse_arguments()
    # These import torch, which takes seconds: the command line is checked first.
    from torch.optim import AdamW

    from minisiss.lab import checkpoint, data, machine
    from minisiss.lab.before_after import BeforeAfter
    from minisiss.lab.run import Run
    from minisiss.sampling import guided
    from minisiss.unlearning import draw_batch, learning_rate, step, update_average
    method = chosen_method(args)
    device = machine.start(args.device)
    at = machine.at_precision(device, args.precision, args.compile)
    base = checkpoint.load_any(args.checkpoint, device, args.memory_timesteps)
    # One network takes the steps, one is the average of its weights, one stays as it was.
    model, average = base.model, copy.deepcopy(base.model)
    network, network_average, network_old = at(model), at(average), at(copy.deepcopy(model))
    report = BeforeAfter(args, base, network_old, device)
    old = guided(network_old, report.prompt)
    settings = vars(args) | {"old": old, "nearest": report.data.nearest}
    optimizer = AdamW(model.parameters(), args.lr, fused=True)
    with Run(args, model, average, optimizer, base.schedule, report.data, base) as this_run:
        report.before(network_old)
        for taken in this_run:  # steps taken so far
            generator = data.step_generator(args.seed, taken, device)
            batch = draw_batch(report.data, args.batch_size, base.schedule, generator, args.draw_x)
            rate = learning_rate(taken, args.steps, args.lr, end=args.lr_end)
            optimizer.param_groups[0]["lr"] = rate
            c = method.c_of(settings, progress=taken / args.steps)
            settings["lam"] = args.lam if c else 0.0  # subtract nothing: use x alone
            loss = method.loss_of(guided(network, report.prompt), base.schedule, settings)
            figures = step(loss, batch, c, optimizer, args.accumulate)
            update_average(average, model, args.ema, taken)
            this_run.log(figures, every=10, shown=("loss_keep", "loss_forget"))
            if this_run.due(args.evaluate_every):
                report.look(this_run, network_average)
    if not this_run.status:
        report.after(this_run, network_average)
    machine.leave()
    return this_run.status


def chosen_method(args: Namespace) -> Any:
    """The row of --method. Raises UserError if there is none, or if x ~ X is not for its loss."""
    from minisiss.unlearning import METHODS, c_of_superfactor, ratio_of_norms

    if args.method not in METHODS:
        raise UserError(f"--method {args.method}: there are {', '.join(METHODS)}")
    if args.draw_x == "all" and METHODS[args.method].c not in (c_of_superfactor, ratio_of_norms):
        raise UserError(f"--draw-x all: is a form of SISS; {args.method} needs x ~ X∖A")
    return METHODS[args.method]


def parse_arguments() -> Namespace:
    parser = Parser(__doc__, "all", "unlearn")
    parser.add_data("bundled")
    add = parser.add_argument
    add("--method", default="siss", help="siss, siss_by_norms, siss_no_is, naive_deletion, "
        "neggrad, erasediff, retrack, old_targets, or your own")
    add("--checkpoint", default="bundled", help="a run, a model.pt, a published DDPM or bundled")
    add("--draw-x", choices=["all", "rest"], default="rest", help="draw x from X, or from X∖A")
    add("--lam", type=number(float, 0, 1), default=0.5, help="λ of the mixture of SISS")
    add("--superfactor", type=number(float, 0), default=90.0, help="s at first (not by norms)")
    add("--subtract-until", type=positive, default=0.0375, help="share of the steps until s is 0")
    add("--grad-ratio", type=number(float, 0), default=0.1, help="ρ of siss_by_norms")
    add("--steps", type=positive_int, default=60, help="optimizer steps")
    add("--batch-size", type=positive_int, default=64, help="images per step")
    add("--accumulate", type=positive_int, default=1, help="parts of a batch: less memory")
    add("--lr", type=positive, default=5e-6, help="learning rate at first")
    add("--lr-end", type=number(float, 0, 1), default=0.0, help="share of it that is left at last")
    add("--ema", type=decay, default=0.0, help="decay of the averaged weights")
    add("--evaluate-every", type=positive_int, default=25, help="steps between pages of the film")
    add("--prompt", metavar="WORDS", help="with --preset prompts: the one to forget")
    parser.add_sampling()
    parser.add_machine()
    parser.add_run("METHOD", save_every=50)
    return parser.parse()


if __name__ == "__main__":
    run(main)
