"""Train the noise predictor ε_θ: on digits with 1% of one T-shirt mixed in, or on a folder of pictures.

    python train_ddpm.py --preset mnist-small --data-root data
    python train_ddpm.py --preset faces-64 --data-root faces
"""

import math
import time
from argparse import Namespace
from dataclasses import fields

from minisiss.errors import Diverged, UserError
from minisiss.machine.command_line import Parser, batch_size, number, positive, positive_int, run

FREE_ON_RESUME = {"steps", "device", "precision", "compile", "checkpoint_activations", "sample_every", "save_every", "resume", "out"}
MOST_PARAMETERS = 10**9  # with their average, gradients and AdamW's state 20 GB


def parse_arguments() -> Namespace:
    parser = Parser(__doc__)
    parser.add_preset("data", "unet", "train")
    parser.add_data("data")
    parser.add_argument("--exclude-forget", action="store_true", help="train without the forget set: the gold standard of unlearning")
    parser.add_argument("--steps", type=positive_int, help="optimizer steps")
    parser.add_argument("--batch-size", type=batch_size, help="images a step, of all ranks together")
    parser.add_argument("--lr", type=positive, help="peak learning rate of AdamW; it falls to 0 along a cosine")
    parser.add_argument("--warmup", type=number(int, 0, 10**9), help="steps over which the learning rate first rises")
    parser.add_argument("--ema", type=number(float, 0, 1), help="decay of the averaged weights, which are the ones that sample")
    parser.add_machine()
    parser.add_argument("--sample-every", type=positive_int, default=2000, help="steps between pictures of samples")
    parser.add_argument("--save-every", type=positive_int, default=500, help="steps between checkpoints")
    parser.add_run("train")
    network = parser.add_argument_group("network")
    network.add_argument("--image-size", type=positive_int)
    network.add_argument("--image-channels", type=positive_int)
    network.add_argument("--channels", type=positive_int, nargs="+", help="channels of each level")
    network.add_argument("--layers-per-block", type=positive_int, help="residual blocks a level")
    network.add_argument("--attention-levels", type=number(int, 0), nargs="*", help="levels with self-attention, the first is 0")
    network.add_argument("--head-channels", type=positive_int, help="channels of an attention head")
    network.add_argument("--norm-groups", type=positive_int)
    network.add_argument("--norm-eps", type=positive)
    network.add_argument("--downsample-padding", type=number(int, 0, 1))
    network.add_argument("--flip-sin-to-cos", type=number(int, 0, 1))
    network.add_argument("--freq-shift", type=number(int, 0, 1))
    return parser.parse_run(free=FREE_ON_RESUME)


def main() -> int:
    args = parse_arguments()
    # torch takes seconds to import: only once the command line is known to be right.
    import torch
    from torchvision.utils import save_image
    from tqdm import tqdm

    from minisiss import losses, unlearning
    from minisiss.data.training_set import draw, step_generator, training_set
    from minisiss.machine import ranks
    from minisiss.machine.device import at_precision, pick_device
    from minisiss.runs import checkpoint, directory
    from minisiss.sampling import sample
    from minisiss.schedule import NoiseSchedule
    from minisiss.unet import UNet, UNetConfig

    device = pick_device(args.device)
    world = ranks.start(device, args.batch_size)
    try:
        config = UNetConfig(**{field.name: getattr(args, field.name) for field in fields(UNetConfig)})
    except ValueError as error:
        raise UserError(error) from error
    with torch.device("meta"):  # counts without taking memory
        count = sum(parameter.numel() for parameter in UNet(config).parameters())
    if count > MOST_PARAMETERS:
        raise UserError(f"--channels, --layers-per-block: a network of {count:,} parameters; here it may have {MOST_PARAMETERS:,}")
    data = world.rank_0_first(lambda: training_set(args.data, args.data_root, args.forget, config.image_shape, args.skip_unreadable)).to(device)
    if args.exclude_forget and not data.k:
        raise UserError("--exclude-forget: name the pictures to leave out with --forget")
    images = data.keep if args.exclude_forget else data.images
    if args.batch_size > len(images):
        raise UserError(f"--batch-size {args.batch_size}: there are only {len(images)} pictures")

    torch.manual_seed(args.seed)
    model = UNet(config).to(device)
    model.checkpoint_activations = args.checkpoint_activations
    schedule = NoiseSchedule.linear().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True)
    parameters = list(model.parameters())
    averaged = UNet(config).to(device).requires_grad_(False)
    averaged.load_state_dict(model.state_dict())
    predict, predict_averaged = (at_precision(network, device, args.precision, args.compile) for network in (world.parallel(model), averaged))
    start, seconds = 0, 0.0

    out = world.on_rank_0(lambda: directory.open_again(args.resume) if args.resume else directory.new_directory(args.out, "train"))
    if args.resume and (out / "model.pt").exists():  # a run that was killed early has none
        state = checkpoint.load_training(out / "model.pt", model, args.steps)
        model.load_state_dict(state["weights"])
        averaged.load_state_dict(state["ema"] or state["weights"])
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state["moments"]})
        start, seconds = state["step"], state["seconds"]
    if not args.resume:
        world.on_rank_0(lambda: directory.write_config(out, args))
    metrics = directory.Metrics(out, start, writes=world.rank == 0)
    began = time.perf_counter() - seconds

    def save(step: int) -> int:
        seconds = time.perf_counter() - began
        made_by = {"script": "train_ddpm.py", "settings": vars(args), "steps": step, "seconds": seconds}
        training = {"step": step, "seconds": seconds, "optimizer": optimizer.state_dict()}
        world.on_rank_0(lambda: checkpoint.save(out / "model.pt", model, schedule, made_by, averaged.state_dict(), training))
        return step

    saved = start or save(0)
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc="training", unit="step")
    with directory.Stop() as stop:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)

            generator = step_generator(args.seed, step, device)
            x = draw(images, args.batch_size, generator, world)
            timesteps = torch.randint(len(schedule), (args.batch_size,), generator=generator, device=device)
            noise = torch.randn((args.batch_size, *images.shape[1:]), generator=generator, device=device)
            timesteps, noise = world.share(timesteps), world.share(noise)
            loss = losses.epsilon_matching(predict, x, timesteps, noise, schedule).per_image().mean()

            optimizer.zero_grad()
            loss.backward()
            loss = world.mean(loss)
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            if not torch.isfinite(norm):
                raise Diverged(f"step {step + 1}: loss {loss:g}, gradient norm {norm:g}; {out / 'model.pt'} holds step {saved}, the last good one")
            optimizer.step()
            if not unlearning.norm([p.detach() for p in parameters]).isfinite():
                raise Diverged(f"step {step + 1}: a parameter is not finite; {out / 'model.pt'} holds step {saved}, the last good one")
            # A young average forgets faster, or it would carry the untrained weights for long.
            decay = min(args.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(averaged.parameters()), [p.detach() for p in parameters], 1 - decay)

            done = step + 1
            signal = world.max(stop.signal or 0)
            if done % 50 == 0 or done == args.steps:
                rate = (done - start) * args.batch_size / (time.perf_counter() - began - seconds)
                bar.set_postfix_str(f"loss {loss.item():.4f}, {rate:.0f} images/s")
                metrics.write(step=done, loss=loss.item(), gradient_norm=norm.item(), lr=learning_rate(step, args), seconds=time.perf_counter() - began)
            if done % args.save_every == 0 or done == args.steps or signal:
                saved = save(done)
            if world.rank == 0 and (done % args.sample_every == 0 or done == args.steps):
                generator = torch.Generator(device).manual_seed(args.seed)
                pictures = sample(predict_averaged, schedule, (64, *images.shape[1:]), generator=generator)
                save_image(pictures, out / f"samples-{done:06d}.png", nrow=8, normalize=True, value_range=(-1, 1))
            if signal:
                bar.close()
                print(f"stopped at step {done}; continue with: python train_ddpm.py --resume {out}")
                return stop.status(signal)

    print(f"done: {out / 'model.pt'}, samples in {out}/samples-{args.steps:06d}.png; next: python eval.py --checkpoint {out / 'model.pt'}")
    return 0


def learning_rate(step: int, args: Namespace) -> float:
    """Linear warm-up, then a cosine from the peak to zero at the last step."""
    warmup = min(1.0, (step + 1) / args.warmup) if args.warmup else 1.0
    return args.lr * warmup * 0.5 * (1 + math.cos(math.pi * step / args.steps))


if __name__ == "__main__":
    run(main)
