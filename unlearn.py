"""Make a trained model forget the T-shirt and keep the digits, or a folder's pictures and keep the others.

    python unlearn.py                             the bundled model, by `unseen`
    python unlearn.py --method siss               or siss_no_is, naive_deletion, neggrad, erasediff, retrack
    python unlearn.py --preset prompts            what a prompt brings back, by SISS
    python unlearn.py --preset celebahq --checkpoint ddpm-celebahq-256/ --data-root faces/ --forget 10000.jpg
"""

import copy
import math
from argparse import Namespace
from functools import partial

from minisiss.machine.command_line import Parser, batch_size, decay, filename, positive, positive_int, run


def main() -> int:
    args = parse_arguments()
    # These import torch, which takes seconds: only once the command line is known to be right.
    from minisiss import unlearning
    from minisiss.data.neighbours import nearest_kept
    from minisiss.data.training_set import checksum, load_training_set, step_generator
    from minisiss.machine.command_line import method_of
    from minisiss.machine.device import adamw, at_precision, pick_device
    from minisiss.machine.ranks import gradient_in_parts, start
    from minisiss.report.prompted import Prompted
    from minisiss.report.unlearned import BeforeAfter
    from minisiss.runs.checkpoint import load_any
    from minisiss.runs.loop import Loop, State
    from minisiss.sampling import guided

    # Load the model and the pictures. `model` takes the steps, `average` is the average of its weights.
    method, settings = method_of(args, unlearning)
    device = pick_device(args.device)
    world = start(device, args.batch_size)
    base = load_any(args.checkpoint, args.memory_timesteps, device)
    model, average, schedule = copy.deepcopy(base.model), base.model.requires_grad_(False), base.schedule
    model.checkpoint_activations = args.checkpoint_activations
    at = partial(at_precision, device=device, precision=args.precision, compiled=args.compile)
    if args.data == "prompts":
        report = Prompted(args, base, at(average), world)
        data = report.data  # samples of the prompt: a fixed one makes the network an unconditional one
    else:
        data = load_training_set(args, model.config.image_shape, device, world, base.forgotten)
        report = BeforeAfter(args, data, at(average), schedule, world)
    network = at(model)
    predict = guided(network, report.prompt)
    optimizer, size = adamw(model, args.lr), args.batch_size
    gradient = partial(gradient_in_parts, micro_batch=math.ceil(size / args.accumulate), world=world)

    near = nearest_kept(data, settings.neighbours) if method.neighbours else None
    old = guided(at(copy.deepcopy(base.model)), report.prompt) if method.old else None
    inputs = data.listing() | {"checkpoint": checksum(*base.model.state_dict().values())}
    state = State(model, average, optimizer, schedule, base.memorised)
    loop = Loop(args, "unlearn.py", state, world, inputs, base=base.made_by)
    report.draw_before()
    ceiling = report.ceiling()
    with loop:
        report.look(loop)
        for step in loop:
            generator = step_generator(args.seed, step, device)
            batch = unlearning.draw_batch(data, size, schedule, generator, args.draw_x, near)
            terms = method.terms(predict, batch, schedule, settings, ceiling, old)
            also = report.hold(network, generator)
            figures = unlearning.step(method, terms, optimizer, settings, gradient_of=gradient, also=also)
            unlearning.update_average(average, model, args.ema)
            loop.stepped()
            if loop.due(10):
                report.log(loop, figures)
            if loop.due(args.evaluate_every):
                report.look(loop)
    if not loop.status:
        report.finish(loop)
    return loop.status


def parse_arguments() -> Namespace:
    parser = Parser(__doc__)
    parser.add_preset("data", "unlearn")
    parser.add_data("bundled")
    add = parser.add_argument
    add("--method", default="siss",
        help="siss, siss_no_is, naive_deletion, neggrad, erasediff, retrack, unseen, or your own")
    add("--checkpoint", type=filename, default="bundled",
        help="the model to unlearn from: a model.pt, the directory of a published DDPM, or 'bundled'")
    parser.add_fields("unlearning", "Settings", one_of=("grad_ratio", "superfactor"))
    add("--draw-x", choices=["all", "rest"], default="rest", help="draw x from X or from X∖A")
    add("--steps", type=positive_int, help="optimizer steps")
    add("--batch-size", type=batch_size, help="images a step, of all ranks together")
    add("--accumulate", type=positive_int, default=1,
        help="parts of a batch, one after the other through the network: less memory, the same step")
    add("--lr", type=positive, help="learning rate of AdamW")
    add("--ema", type=decay, default=0.0, help="decay of the averaged weights; 0: the last")
    add("--evaluate-every", type=positive_int, default=25, help="steps between looks at what is remembered")
    parser.add_prompt()
    parser.add_sampling()
    parser.add_machine()
    parser.add_run("METHOD", save_every=50)
    return parser.parse_run()


if __name__ == "__main__":
    run(main)
