"""What unlearn.py shows: samples and memory before and after, and what is remembered in between."""

import math
import time
from argparse import Namespace
from functools import partial
from statistics import median_high

import torch
from torch import Tensor
from tqdm import tqdm

from minisiss.data.training_set import TrainingSet, to_float
from minisiss.machine.command_line import command
from minisiss.machine.device import chosen_precision
from minisiss.machine.ranks import World
from minisiss.metrics import classifier, forgetting
from minisiss.metrics.samples import draw_again, draw_samples
from minisiss.report.evaluation import quality
from minisiss.report.pictures import Memories, save_before_after, save_gif, save_memory, save_strip
from minisiss.report.table import aligned
from minisiss.runs.loop import Loop
from minisiss.schedule import Model, NoiseSchedule

# Few, the same with the same noise at every look: the differences are those of the model.
LOOK_IMAGES, LOOK_DRAWS = 48, 8
SHOWN = 12  # samples that forgetting.gif shows again and again
CHANGES = {1.1: "as before", 1.5: "a little worse", math.inf: "much worse"}  # times the distance before
FEW = 2.0  # effective images: with fewer, hardly one image of a batch counts


class BeforeAfter:
    """A model before and after unlearning, and looks at it in between. Raises UserError where A is empty."""

    prompt: Tensor | None = None  # at which the model is looked at
    told = warned = False  # how long it takes; that hardly one image of a batch counts
    drawing = looking = 0.0  # seconds that drawing before and a look took

    def __init__(self, args: Namespace, data: TrainingSet, model: Model, schedule: NoiseSchedule,
                 world: World) -> None:
        self.args, self.data, self.model, self.schedule, self.world = args, data, model, schedule, world
        (self.name, self.forgotten), self.mnist = data.measured(args.draws), args.data == "mnist"
        self.sets = {self.name: self.forgotten}
        if not self.mnist:  # a model of few pictures remembers those it keeps, one of many digits does not
            self.sets["kept pictures"] = data.kept()
        if data.before:
            self.sets["forgotten before"] = TrainingSet(data.before, len(data.before)).measured(1)[1]
        self.middle = median_high(args.memory_timesteps)
        device, what = schedule.gamma.device, f"{args.steps} steps of {args.batch_size} images"
        precision = chosen_precision(device, args.precision)
        print(f"forgetting {self.name} by {args.method}: {what}, on {device} in {precision}")
        self.film: dict[int, tuple[Tensor, Tensor]] = {}  # of each look samples, and what comes back
        self.tau: Tensor | None = None

    def ceiling(self) -> Tensor | None:
        """--ceiling times τ of the model as it is now, [T]; the first look logs it. None without one."""
        if self.args.ceiling:
            tau = forgetting.look_alike_loss(self.model, self.schedule, self.data)
            self.tau = self.args.ceiling * tau
        return self.tau

    def hold(self, network: Model, generator: torch.Generator) -> Tensor | None:
        """A further loss of the network; among digits and pictures there is none."""

    def draw_before(self) -> None:
        """Draw samples, and what is remembered, from the model as it is now."""
        began = time.perf_counter()
        self.before = samples, _ = self.draw("before")
        self.drawing = time.perf_counter() - began
        self.copies = torch.zeros(len(samples), dtype=torch.bool)
        if self.mnist:
            self.copies = forgetting.is_copy(samples, self.forgotten[:1].cpu())
        # At most half of those that one sees again and again are T-shirts.
        copies, others = (which.nonzero()[:, 0].tolist() for which in (self.copies, ~self.copies))
        self.shown = [*copies[: SHOWN // 2], *others][:SHOWN] if not self.args.eta else []

    def draw(self, when: str) -> tuple[Tensor, dict[str, Memories]]:
        """Samples [N, C, H, W] in [−1, 1], and what comes back of each set; the same noise each time."""
        args = self.args
        samples = draw_samples(
            self.model, self.schedule, args.samples, tuple(self.forgotten.shape[1:]), seed=args.seed,
            steps=args.sampling_steps, eta=args.eta, world=self.world, title=f"sampling {when}")
        memories = {name: {} for name in self.sets}
        for name, originals in self.sets.items():
            for t in tqdm(args.memory_timesteps, desc=f"{name} {when}", unit="timestep", leave=False):
                memories[name][t] = self.recall(originals, t)
        return to_float(samples), memories

    def recall(self, originals: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
        """Images noised to a timestep, and what the model makes of them."""
        return forgetting.noise_and_denoise(self.model, self.schedule, originals, timestep, self.args.seed)

    def losses(self) -> dict[str, float]:
        """How well noise is predicted on X∖A and on A."""
        loss_on = partial(forgetting.denoising_loss, self.model, self.schedule, count=LOOK_IMAGES)
        return {"loss_on_kept": loss_on(self.data.keep)[0], "loss_on_forget": loss_on(self.data.forget)[0]}

    def look(self, loop: Loop) -> None:
        """Log what comes back of the forget set at the middle timestep, and how well noise is predicted."""
        began, step, args = time.perf_counter(), loop.state.step, self.args
        some = self.forgotten[:LOOK_DRAWS]
        memory = forgetting.similarity(self.recall(some, self.middle)[1], some).mean()
        figures = {"memory": memory, "memory_timestep": self.middle} | self.losses()
        if self.tau is not None and not step:
            figures["ceiling"] = self.tau[len(self.tau) // 20 :: len(self.tau) // 10]  # of each tenth of t
        loop.log(figures, shown=("memory",))
        one = self.forgotten[:1]
        strip = torch.cat([self.recall(one, t)[1] for t in args.memory_timesteps])
        again = draw_again(self.model, self.schedule, self.shown, args.samples, tuple(one.shape[1:]),
                           seed=args.seed, steps=args.sampling_steps)
        self.film[step] = again, strip
        self.looking = time.perf_counter() - began

    def log(self, loop: Loop, figures: dict[str, Tensor]) -> None:
        """Log a step's figures; say once how long it will take, and once if hardly an image of a batch
        counts."""
        figures, state, args = loop.log(figures, shown=("ess_keep", "ess_forget", "c")), loop.state, self.args
        if not self.told:
            looks = (args.steps - 1) // args.evaluate_every - (state.step - 1) // args.evaluate_every + 1
            steps = (args.steps - state.step) * state.seconds / state.step
            seconds = steps + looks * self.looking + self.drawing
            loop.bar.write(f"about {seconds:.0f} s to go")
            self.told = True
        few = [name for name in ("ess_keep", "ess_forget") if figures.get(name, FEW) < FEW]
        if few and not self.warned:
            what = "a batch in which hardly one image counts; try --lam 0.5 or a larger --batch-size"
            loop.bar.write(f"warning: step {state.step}: {few[0]} is {figures[few[0]]:.1f}, {what}")
            self.warned = True

    def finish(self, loop: Loop) -> None:
        """Draw and measure again; print what is forgotten and what is kept, and write the pictures."""
        (before, memories_before), (after, memories_after) = self.before, self.draw("after")
        if self.world.rank > 0:
            return
        out, args, of_samples = loop.out, self.args, self.mnist and self.args.samples
        blocks, words = self.compare_samples(before, after, loop) if of_samples else ({}, [])
        for name, originals in self.sets.items():
            rows = blocks.setdefault(name, [])
            for t in args.memory_timesteps:
                found = memories_before[name][t][1], memories_after[name][t][1]
                was, now = (self.how_alike(denoised, originals) for denoised in found)
                rows.append([f"noised to t = {t} comes back (similarity)", was, now])
                if t == self.middle and not of_samples:
                    words.append(f"{name} noised to t = {t} comes back: {now} ({was} before)")
        wide = max(len(row[0]) for rows in blocks.values() for row in rows)
        for name, rows in blocks.items():
            title = f"forgotten: {name}" if name == self.name else name
            print(f"\n{aligned([[title.ljust(wide), 'before', 'after'], *rows])}")
        save_before_after(out / "before_after.png", before, after, self.copies)
        save_memory(out / "memory.png", self.forgotten, memories_before[self.name], memories_after[self.name])
        strips = {step: memory for step, (_, memory) in self.film.items()}
        save_strip(out / "memory_by_step.png", args.memory_timesteps, strips)
        save_gif(out / "forgetting.gif", args.memory_timesteps, self.film)
        print(f"\n{'; '.join(words)}. {loop.state.step} steps took {loop.state.seconds:.1f} s.")
        pictures = ", ".join(sorted(path.name for kind in ("*.png", "*.gif") for path in out.glob(kind)))
        following = command("eval.py", args, checkpoint=loop.path)
        print(f"Look at the pictures in {out}: {pictures}; next: {following}")

    def compare_samples(self, before: Tensor, after: Tensor, loop: Loop) -> tuple[dict, list[str]]:
        """How many samples are the T-shirt, and how good the others are: rows of the table, and in words."""
        copies = self.copies, forgetting.is_copy(after, self.forgotten[:1].cpu())
        (was, now), count = (int(found.sum()) for found in copies), len(before)
        network, real = classifier.load_classifier()
        qualities = [quality(*classifier.classify(network, samples), found, real)
                     for samples, found in zip((before, after), copies, strict=True)]
        old, new = (one["frechet"] for one in qualities)
        enough = {} if None in (old, new) else {"frechet_before": old, "frechet": new}
        loop.write(samples=count, tshirt_rate_before=was / count, tshirt_rate=now / count, **enough)
        forgotten = [f"T-shirts among {count:,} samples", f"{was / count:.2%}", f"{now / count:.2%}"]
        words = [f"{now or 'no'} T-shirt{'s' if now > 1 else ''} among {count:,} samples ({was} before)"]
        if not enough:
            return {self.name: [forgotten]}, words
        change = next(words for times, words in CHANGES.items() if new <= times * old)
        words.append(f"digits {change} (Fréchet distance {new:.1f}, {old:.1f} before)")
        kept = [["Fréchet distance of the samples (0: as the real digits)", f"{old:.1f}", f"{new:.1f}"],
                ["inception score (at best 10)", *(f"{one['inception_score']:.2f}" for one in qualities)]]
        return {self.name: [forgotten], "kept: digits": kept}, words

    def how_alike(self, denoised: Tensor, originals: Tensor) -> str:
        """Which share of the T-shirts came back, or how many decibels; and the similarity."""
        similarity = forgetting.similarity(denoised, originals).mean()
        if self.mnist:
            return f"{forgetting.is_copy(denoised, originals).float().mean():.0%} ({similarity:.2f})"
        return f"{forgetting.psnr(denoised, originals).mean():.1f} dB ({similarity:.2f})"
