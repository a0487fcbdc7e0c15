"""Make a trained model forget the T-shirt and keep the digits.

    python unlearn.py                             the bundled model, by SISS
    python unlearn.py --method naive_deletion     or siss_no_is, neggrad, erasediff
"""

import math
import time
from argparse import Namespace
from pathlib import Path

from minisiss.cli import Diverged, Parser, UserError, batch_size, filename, number, positive, positive_int, run

FREE_ON_RESUME = {"steps", "device", "precision", "save_every", "samples"}


def parse_arguments() -> Namespace:
    parser = Parser(__doc__)
    parser.add_preset("unlearn")
    parser.add_argument("--method", default="siss", help="siss, siss_no_is, naive_deletion, neggrad, erasediff, or one you add to minisiss.unlearning.METHODS")
    parser.add_argument("--checkpoint", type=filename, default="bundled", help="the model to unlearn from, a model.pt; 'bundled': the one that comes along")
    parser.add_argument("--data-root", type=filename, default="bundled", help="MNIST and FashionMNIST in torchvision's layout, downloaded if missing; 'bundled': the 10,000 digits that come along")
    parser.add_argument("--lam", type=number(float, 0, 1), default=0.5, help="λ of the mixture: the share of noisy images made from the forget set (siss)")
    strength = parser.add_mutually_exclusive_group()
    strength.add_argument("--grad-ratio", type=number(float, 0), default=0.1, help="ρ: norm of the subtracted gradient, as a fraction of the kept one's (siss, siss_no_is)")
    strength.add_argument("--superfactor", type=number(float, 0), help="s: subtract (1+s) times, instead of the rule by norms; 0 is the theory's naive deletion")
    parser.add_argument("--erasediff-eta", type=number(float, 0), default=0.1, help="η of EraseDiff's rule")
    parser.add_argument("--draw-x", choices=["all", "rest"], help="where x is drawn from: all is X, rest is X∖A (default: all for SISS, as in the theory)")
    parser.add_argument("--steps", type=positive_int, help="optimizer steps")
    parser.add_argument("--batch-size", type=batch_size, help="images a step")
    parser.add_argument("--accumulate", type=positive_int, default=1, help="parts in which a batch goes through the network: less memory, the same step")
    parser.add_argument("--lr", type=positive, help="learning rate of AdamW")
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

    from minisiss import checkpoint, metrics, runs, unlearning
    from minisiss.data import mnist_with_tshirt, step_generator, to_float
    from minisiss.device import at_precision, pick_device
    from minisiss.pictures import save_before_after, save_memory
    from minisiss.sampling import sample_batches

    if args.method not in unlearning.METHODS:
        raise UserError(f"--method '{args.method}': unknown; choose from {', '.join(unlearning.METHODS)}")
    device = pick_device(args.device)
    data = mnist_with_tshirt(args.data_root).to(device)
    image_shape = data.images.shape[1:]
    base = checkpoint.load_matching(args.checkpoint, image_shape, args.memory_timesteps, device)
    model, schedule = base.model, base.schedule
    predict = at_precision(model, device, args.precision)
    tshirt = to_float(data.forget[:1])

    method = unlearning.METHODS[args.method]
    settings = unlearning.Settings(args.lam, args.grad_ratio, args.superfactor, args.erasediff_eta)
    loss_settings = {name: getattr(settings, name) for name in method.settings}
    start, seconds = 0, 0.0
    if args.resume:
        out = Path(args.resume)
        state = checkpoint.load_training(out / "model.pt", model, args.steps)
        start, seconds = state["step"], state["seconds"]
    else:
        out = runs.new_directory(args.out, args.method)
        runs.write_json(out / "config.json", {key: value for key, value in vars(args).items() if key not in ("resume", "out")})
    log = runs.Metrics(out, start)

    def draw_samples(when: str) -> torch.Tensor:
        """Samples from the same noise at every call: [samples, C, H, W]."""
        images = [tshirt[:0]]
        with tqdm(total=args.samples, desc=f"sampling {when}", unit="image") as bar:
            for batch in sample_batches(predict, schedule, args.samples, image_shape, args.seed, steps=args.sampling_steps, eta=args.eta):
                images.append(batch)
                bar.update(len(batch))
        return torch.cat(images)

    def recall(timestep: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The T-shirt noised to a timestep, and what the model makes of it."""
        return metrics.memory(predict, schedule, tshirt, timestep, args.draws, args.seed)

    def look(step: int, denoised: torch.Tensor) -> float:
        """Log what is remembered, by the T-shirt noised to `middle` and denoised, and how well noise is predicted now."""
        remembered = metrics.similarity(denoised, tshirt).mean().item()
        # A few images, the same with the same noise at every look: cheap, and the differences are those of the model.
        (kept,), (forgotten,) = (metrics.denoising_loss(predict, schedule, images, 48) for images in (data.keep, data.forget))
        log.write(step=step, seconds=seconds, memory=remembered, memory_timestep=middle, loss_on_kept=kept, loss_on_forget=forgotten)
        return remembered

    before, memory_before = draw_samples("before"), {t: recall(t) for t in args.memory_timesteps}

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True)
    if args.resume:
        model.load_state_dict(state["weights"])
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state["moments"]})

    def save(step: int) -> int:
        made_by = {"script": "unlearn.py", "settings": vars(args), "steps": step, "seconds": seconds, "base": base.made_by}
        training = {"step": step, "seconds": seconds, "optimizer": optimizer.state_dict()}
        checkpoint.save(out / "model.pt", model, schedule, made_by, training=training)
        return step

    saved = start if args.resume else save(0)

    middle = sorted(args.memory_timesteps)[len(args.memory_timesteps) // 2]
    remembered, warned = metrics.similarity(memory_before[middle][1], tshirt).mean().item(), False
    if not args.resume:
        look(0, memory_before[middle][1])
    with runs.Stop() as stop, tqdm(range(start, args.steps), initial=start, total=args.steps, desc=args.method, unit="step") as bar:
        for step in bar:
            began = time.perf_counter()
            generator = step_generator(args.seed, step, device)
            batch = unlearning.draw_batch(data, args.batch_size, schedule, generator, args.draw_x or method.x_from)
            terms = method.loss(predict, batch, schedule, **loss_settings)
            try:
                figures = unlearning.step(method, terms, optimizer, settings, micro_batch=math.ceil(args.batch_size / args.accumulate))
            except Diverged as error:
                raise Diverged(f"step {step + 1}: {error}; {out / 'model.pt'} holds step {saved}, the last good one") from error
            seconds += time.perf_counter() - began

            done = step + 1
            last = done == args.steps or stop.signal
            if done % 10 == 0 or last:
                figures = {name: value.item() for name, value in figures.items()}
                bar.set_postfix({"memory": f"{remembered:.2f}", **{name: f"{figures[name]:.3g}" for name in ("ess_keep", "ess_forget", "c") if name in figures}})
                log.write(step=done, seconds=seconds, **figures)
                few = [name for name in ("ess_keep", "ess_forget") if figures.get(name, 2) < 2]
                if few and not warned:
                    bar.write(f"warning: step {done}: {few[0]} is {figures[few[0]]:.1f}, a batch in which hardly one image counts; try --lam 0.5 or a larger --batch-size")
                    warned = True
            if done % args.evaluate_every == 0 or last:
                remembered = look(done, recall(middle)[1])
            if done % args.save_every == 0 or last:
                saved = save(done)
            if stop.signal:
                print(f"stopped at step {done}; continue with: python unlearn.py --resume {out}")
                return stop.status

    after, memory_after = draw_samples("after"), {t: recall(t) for t in args.memory_timesteps}

    print(f"\n{'':50}{'before':>14}{'after':>14}")
    if args.samples:
        rate_before, rate_after = (metrics.is_copy(images, tshirt).float().mean().item() for images in (before, after))
        print(f"{f'T-shirts among {args.samples:,} samples':50}{rate_before:>14.2%}{rate_after:>14.2%}")
        log.write(step=args.steps, seconds=seconds, samples=args.samples, tshirt_rate_before=rate_before, tshirt_rate=rate_after)
    for t in args.memory_timesteps:
        print(f"{f'T-shirt noised to t = {t} comes back (similarity)':50}", end="")
        for _, denoised in (memory_before[t], memory_after[t]):
            back, alike = metrics.is_copy(denoised, tshirt).float().mean(), metrics.similarity(denoised, tshirt).mean()
            print(f"{f'{back:.0%} ({alike:.2f})':>14}", end="")
        print()
    print(f"{'seconds of unlearning':50}{'':14}{seconds:>14.1f}\n")

    save_before_after(out / "before_after.png", before, after, metrics.is_copy(before, tshirt))
    save_memory(out / "memory.png", tshirt, memory_before, memory_after)
    print(f"Look at {out / 'before_after.png'} and {out / 'memory.png'}; next: python eval.py --checkpoint {out / 'model.pt'}")
    return 0


if __name__ == "__main__":
    run(main)
