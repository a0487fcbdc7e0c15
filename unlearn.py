"""Make a trained model forget the T-shirt and keep the digits, or forget pictures of a folder and keep the others.

    python unlearn.py                             the bundled model, by SISS
    python unlearn.py --method naive_deletion     or siss_no_is, neggrad, erasediff
    python unlearn.py --preset celebahq --checkpoint ddpm-celebahq-256/ --data-root celeba_hq_256/ --forget 10000.jpg
"""

import copy
import itertools
import math
import time
from argparse import Namespace
from functools import partial

from minisiss.errors import Diverged, UserError
from minisiss.machine.command_line import Parser, batch_size, filename, number, positive, positive_int, run

FREE_ON_RESUME = {"steps", "device", "precision", "compile", "checkpoint_activations", "save_every", "samples"}


def parse_arguments() -> Namespace:
    parser = Parser(__doc__)
    parser.add_preset("data", "unlearn")
    parser.add_data("bundled")
    parser.add_argument("--method", default="siss", help="siss, siss_no_is, naive_deletion, neggrad, erasediff, or one you add to minisiss.unlearning.METHODS")
    parser.add_argument("--checkpoint", type=filename, default="bundled", help="the model to unlearn from: a model.pt, the directory of a published DDPM, or 'bundled': the one that comes along")
    parser.add_argument("--lam", type=number(float, 0, 1), default=0.5, help="λ of the mixture: the share of noisy images made from the forget set (siss)")
    strength = parser.add_mutually_exclusive_group()
    strength.add_argument("--grad-ratio", type=number(float, 0), default=0.1, help="ρ: norm of the subtracted gradient, as a fraction of the kept one's (siss, siss_no_is)")
    strength.add_argument("--superfactor", type=number(float, 0), help="s: subtract (1+s) times, instead of the rule by norms; 0 is the theory's naive deletion")
    parser.add_argument("--norm-every", type=positive_int, default=1, metavar="K", help="take the norms for c in one of K steps, and keep c for the others, which then need one pass through the network instead of two (siss)")
    parser.add_argument("--erasediff-eta", type=number(float, 0), default=0.1, help="η of EraseDiff's rule")
    parser.add_argument("--draw-x", choices=["all", "rest"], help="where x is drawn from: all is X, rest is X∖A (default: all for SISS, as in the theory)")
    parser.add_argument("--steps", type=positive_int, help="optimizer steps")
    parser.add_argument("--batch-size", type=batch_size, help="images a step, of all ranks together")
    parser.add_argument("--accumulate", type=positive_int, default=1, help="parts in which a batch goes through the network: less memory, the same step")
    parser.add_argument("--lr", type=positive, help="learning rate of AdamW")
    parser.add_argument("--ema", type=number(float, 0, 1), default=0.0, help="decay of the averaged weights, which are the ones that are looked at and kept; 0: the last ones")
    parser.add_argument("--evaluate-every", type=positive_int, default=25, help="steps between looks at what is remembered")
    parser.add_argument("--save-every", type=positive_int, default=50, help="steps between checkpoints")
    parser.add_sampling()
    parser.add_machine()
    parser.add_run("METHOD")
    return parser.parse_run(free=FREE_ON_RESUME)


def main() -> int:
    args = parse_arguments()
    import torch
    from tqdm import tqdm

    from minisiss import unlearning
    from minisiss.data.training_set import step_generator, training_set
    from minisiss.machine import ranks
    from minisiss.machine.device import at_precision, pick_device
    from minisiss.metrics import forgetting
    from minisiss.report.pictures import save_before_after, save_memory, save_strip
    from minisiss.runs import checkpoint, directory
    from minisiss.sampling import sample_batches

    if args.method not in unlearning.METHODS:
        raise UserError(f"--method '{args.method}': unknown; choose from {', '.join(unlearning.METHODS)}")
    if args.norm_every > 1 and "lam" not in unlearning.METHODS[args.method].settings:
        raise UserError(f"--norm-every {args.norm_every}: needs a loss whose two terms share their noisy images, as those of siss do")
    device = pick_device(args.device)
    world = ranks.start(device, args.batch_size)
    base = checkpoint.load_any(args.checkpoint, args.memory_timesteps, device)
    model, schedule, image_shape = base.model, base.schedule, base.model.config.image_shape
    stepped = copy.deepcopy(model)  # takes the steps; `model` is their average, and what is looked at and kept
    model.requires_grad_(False)
    stepped.checkpoint_activations = args.checkpoint_activations
    averaged, parameters = list(model.parameters()), [p.detach() for p in stepped.parameters()]
    predict, predict_stepped = (at_precision(network, device, args.precision, args.compile) for network in (model, stepped))
    data = world.rank_0_first(lambda: training_set(args.data, args.data_root, args.forget, image_shape, args.skip_unreadable)).to(device)
    forgotten = data.originals(args.draws)
    if args.data == "pictures" and args.batch_size > len(data.keep):
        raise UserError(f"--batch-size {args.batch_size}: there are only {len(data.keep)} pictures to keep")
    sets = {data.name: forgotten}
    if args.data == "pictures":  # a model of few pictures remembers those it keeps, one of many digits does not
        sets["kept pictures"] = data.kept()

    method = unlearning.METHODS[args.method]
    settings = unlearning.Settings(args.lam, args.grad_ratio, args.superfactor, args.erasediff_eta)
    loss_settings = {name: getattr(settings, name) for name in method.settings}
    start, seconds, state, c = 0, 0.0, None, None
    out = world.on_rank_0(lambda: directory.open_again(args.resume) if args.resume else directory.new_directory(args.out, args.method))
    if not args.resume:
        world.on_rank_0(lambda: directory.write_config(out, args))
    elif (out / "model.pt").exists():  # a run that was killed early has none
        state = checkpoint.load_training(out / "model.pt", model, args.steps)
        start, seconds = state["step"], state["seconds"]
    log = directory.Metrics(out, start, writes=world.rank == 0)

    def draw_samples(when: str) -> torch.Tensor:
        """Samples from the same noise at every call: [samples, C, H, W]."""
        images = [forgotten[:0]]
        with tqdm(total=args.samples, desc=f"sampling {when}", unit="image") as bar:
            for batch in sample_batches(predict, schedule, args.samples, image_shape, args.seed, steps=args.sampling_steps, eta=args.eta, world=world):
                images.append(batch)
                bar.update(len(batch))
        return torch.cat(images)

    def recall(originals: torch.Tensor, timestep: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images noised to a timestep, and what the model makes of them."""
        return forgetting.memory(predict, schedule, originals, timestep, args.seed)

    def remember(when: str) -> dict[str, dict[int, tuple[torch.Tensor, torch.Tensor]]]:
        """What comes back of each set of images at each timestep."""
        bar = partial(tqdm, args.memory_timesteps, unit="timestep", leave=False)
        return {name: {t: recall(originals, t) for t in bar(desc=f"{name} {when}")} for name, originals in sets.items()}

    def look(step: int, denoised: torch.Tensor) -> float:
        """Log what is remembered, by the forget set noised to `middle` and denoised, and how well noise is predicted now."""
        remembered = forgetting.similarity(denoised, forgotten).mean().item()
        # A few images, the same with the same noise at every look: cheap, and the differences are those of the model.
        (loss_on_kept,), (loss_on_forget,) = (forgetting.denoising_loss(predict, schedule, images, 48) for images in (data.keep, data.forget))
        if step > start or start == 0:  # a resumed run has its first look in the log already
            log.write(step=step, seconds=seconds, memory=remembered, memory_timestep=middle, loss_on_kept=loss_on_kept, loss_on_forget=loss_on_forget)
        strip[step] = torch.cat([recall(forgotten[:1], t)[1] for t in args.memory_timesteps])
        return remembered

    middle, strip = sorted(args.memory_timesteps)[len(args.memory_timesteps) // 2], {}
    before, memory_before = draw_samples("before"), remember("before")

    optimizer = torch.optim.AdamW(stepped.parameters(), lr=args.lr, fused=True)
    if state:
        stepped.load_state_dict(state["weights"])
        model.load_state_dict(state["ema"] or state["weights"])
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state["moments"]})
        c = None if state["c"] is None else torch.tensor(state["c"], device=device)

    def save(step: int) -> int:
        made_by = {"script": "unlearn.py", "settings": vars(args), "steps": step, "seconds": seconds, "base": base.made_by}
        training = {"step": step, "seconds": seconds, "optimizer": optimizer.state_dict(), "c": None if c is None else c.item()}
        world.on_rank_0(lambda: checkpoint.save(out / "model.pt", stepped, schedule, made_by, model.state_dict(), training))
        return step

    saved = start or save(0)

    remembered, warned = look(start, (recall(forgotten, middle) if start else memory_before[data.name][middle])[1]), False
    with directory.Stop() as stop, tqdm(range(start, args.steps), initial=start, total=args.steps, desc=args.method, unit="step") as bar:
        for step in bar:
            began = time.perf_counter()
            generator = step_generator(args.seed, step, device)
            batch = unlearning.draw_batch(data, args.batch_size, schedule, generator, args.draw_x or method.x_from, world)
            terms = method.loss(predict_stepped, batch, schedule, **loss_settings)
            try:
                figures = unlearning.step(
                    method, terms, optimizer, settings, micro_batch=math.ceil(args.batch_size / args.accumulate), world=world,
                    c=c if step % args.norm_every else None,
                )  # fmt: skip
            except Diverged as error:
                raise Diverged(f"step {step + 1}: {error}; {out / 'model.pt'} holds step {saved}, the last good one") from error
            c = figures.get("c")
            torch._foreach_lerp_(averaged, parameters, 1 - args.ema)
            seconds += time.perf_counter() - began

            done = step + 1
            signal = world.max(stop.signal or 0)
            last = done == args.steps or signal
            if done % 10 == 0 or last:
                figures = {name: value.item() for name, value in figures.items()}
                bar.set_postfix({"memory": f"{remembered:.2f}", **{name: f"{figures[name]:.3g}" for name in ("ess_keep", "ess_forget", "c") if name in figures}})
                log.write(step=done, seconds=seconds, **figures)
                few = [name for name in ("ess_keep", "ess_forget") if figures.get(name, 2) < 2]
                if few and not warned:
                    bar.write(f"warning: step {done}: {few[0]} is {figures[few[0]]:.1f}, a batch in which hardly one image counts; try --lam 0.5 or a larger --batch-size")
                    warned = True
            if done % args.evaluate_every == 0 or last:
                remembered = look(done, recall(forgotten, middle)[1])
            if done % args.save_every == 0 or last:
                saved = save(done)
            if signal:
                print(f"stopped at step {done}; continue with: python unlearn.py --resume {out}")
                return stop.status(signal)

    after, memory_after = draw_samples("after"), remember("after")
    if world.rank > 0:
        return 0

    print(f"\n{'':50}{'before':>14}{'after':>14}")
    copies = forgetting.is_copy(before, forgotten[:1]) if args.data == "mnist" else torch.zeros(len(before), dtype=torch.bool)
    if args.samples and args.data == "mnist":
        rate_before, rate_after = copies.float().mean().item(), forgetting.is_copy(after, forgotten[:1]).float().mean().item()
        print(f"{f'T-shirts among {args.samples:,} samples':50}{rate_before:>14.2%}{rate_after:>14.2%}")
        log.write(step=args.steps, seconds=seconds, samples=args.samples, tshirt_rate_before=rate_before, tshirt_rate=rate_after)
    for (name, originals), t in itertools.product(sets.items(), args.memory_timesteps):
        print(f"{f'{name} noised to t = {t} comes back (similarity)':50}", end="")
        for memory in (memory_before, memory_after):
            denoised = memory[name][t][1]
            alike, db = (measure(denoised, originals).mean() for measure in (forgetting.similarity, forgetting.psnr))
            back = f"{forgetting.is_copy(denoised, originals).float().mean():.0%}" if args.data == "mnist" else f"{db:.1f} dB"
            print(f"{f'{back} ({alike:.2f})':>14}", end="")
        print()
    print(f"{'seconds of unlearning':50}{'':14}{seconds:>14.1f}\n")

    save_before_after(out / "before_after.png", before, after, copies)
    save_memory(out / "memory.png", forgotten, memory_before[data.name], memory_after[data.name])
    save_strip(out / "memory_by_step.png", args.memory_timesteps, strip)
    print(f"Look at the pictures in {out}: {', '.join(sorted(path.name for path in out.glob('*.png')))}; next: python eval.py --checkpoint {out / 'model.pt'}")
    return 0


if __name__ == "__main__":
    run(main)
