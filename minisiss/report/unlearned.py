"""What unlearn.py shows: samples and memory before and after, and what is remembered in between."""

from argparse import Namespace
from statistics import median_high

import torch
from torch import Tensor
from tqdm import tqdm

from minisiss.data.training_set import TrainingSet, to_float
from minisiss.machine.command_line import command
from minisiss.machine.ranks import World
from minisiss.metrics import forgetting
from minisiss.metrics.samples import draw_samples
from minisiss.report.pictures import Memories, save_before_after, save_memory, save_strip
from minisiss.report.table import aligned
from minisiss.runs.loop import Loop
from minisiss.schedule import Model, NoiseSchedule

LOOK_IMAGES = 48  # few, the same with the same noise at every look: the differences are those of the model
FEW = 2.0  # effective images: with fewer, hardly one image of a batch counts


class BeforeAfter:
    """A model before and after unlearning, and looks at it in between. Raises UserError where A is empty."""

    prompt: Tensor | None = None  # at which the model is looked at

    def __init__(self, args: Namespace, data: TrainingSet, model: Model, schedule: NoiseSchedule,
                 world: World) -> None:
        self.args, self.data, self.model, self.schedule, self.world = args, data, model, schedule, world
        (self.name, self.forgotten), self.mnist = data.measured(args.draws), args.data == "mnist"
        self.sets, self.warned = {self.name: self.forgotten}, False
        if not self.mnist:  # a model of few pictures remembers those it keeps, one of many digits does not
            self.sets["kept pictures"] = data.kept()
        if data.before:
            self.sets["forgotten before"] = TrainingSet(data.before, len(data.before)).measured(1)[1]
        self.middle = median_high(args.memory_timesteps)
        self.strip: dict[int, Tensor] = {}
        self.tau: Tensor | None = None

    def ceiling(self) -> Tensor | None:
        """--ceiling times τ of the model as it is now, [T]; the first look logs it. None without one."""
        if self.args.ceiling:
            tau = forgetting.look_alike_loss(self.model, self.schedule, self.data)
            self.tau = self.args.ceiling * tau
        return self.tau

    def draw_before(self) -> None:
        """Draw samples, and what is remembered, from the model as it is now."""
        self.before = self.draw("before")

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

    def look(self, loop: Loop) -> None:
        """Log what comes back of the forget set at the middle timestep, and how well noise is predicted."""
        step = loop.state.step
        _, back = self.recall(self.forgotten, self.middle) if step else self.before[1][self.name][self.middle]
        memory = forgetting.similarity(back, self.forgotten).mean()
        figures = {"memory": memory, "memory_timestep": self.middle}
        for part, images in (("kept", self.data.keep), ("forget", self.data.forget)):
            (loss,) = forgetting.denoising_loss(self.model, self.schedule, images, LOOK_IMAGES)
            figures[f"loss_on_{part}"] = loss
        if self.tau is not None and not step:
            figures["ceiling"] = self.tau[len(self.tau) // 20 :: len(self.tau) // 10]  # of each tenth of t
        loop.log(figures, shown=("memory",))
        one = self.forgotten[:1]
        self.strip[step] = torch.cat([self.recall(one, t)[1] for t in self.args.memory_timesteps])

    def log(self, loop: Loop, figures: dict[str, Tensor]) -> None:
        """Log a step's figures; say once if hardly an image of a batch counts."""
        figures = loop.log(figures, shown=("ess_keep", "ess_forget", "c"))
        few = [name for name in ("ess_keep", "ess_forget") if figures.get(name, FEW) < FEW]
        if few and not self.warned:
            what = "a batch in which hardly one image counts; try --lam 0.5 or a larger --batch-size"
            loop.bar.write(f"warning: step {loop.state.step}: {few[0]} is {figures[few[0]]:.1f}, {what}")
            self.warned = True

    def finish(self, loop: Loop) -> None:
        """Draw and measure again; print the table, and write the pictures."""
        (before, memories_before), (after, memories_after) = self.before, self.draw("after")
        if self.world.rank > 0:
            return
        rows, state, count = [["", "before", "after"]], loop.state, self.args.samples
        copies = torch.zeros(len(before), dtype=torch.bool)
        if count and self.mnist:
            tshirt = self.forgotten[:1].cpu()
            copies = forgetting.is_copy(before, tshirt)
            was, now = (found.float().mean().item() for found in (copies, forgetting.is_copy(after, tshirt)))
            rows.append([f"T-shirts among {count:,} samples", f"{was:.2%}", f"{now:.2%}"])
            rates = {"samples": count, "tshirt_rate_before": was, "tshirt_rate": now}
            loop.metrics.write(step=state.step, seconds=state.seconds, **rates)
        for name, originals in self.sets.items():
            for t in self.args.memory_timesteps:
                denoised = memories_before[name][t][1], memories_after[name][t][1]
                cells = [self.how_alike(images, originals) for images in denoised]
                rows.append([f"{name} noised to t = {t} comes back (similarity)", *cells])
        out = loop.out
        save_before_after(out / "before_after.png", before, after, copies)
        save_memory(out / "memory.png", self.forgotten, memories_before[self.name], memories_after[self.name])
        save_strip(out / "memory_by_step.png", self.args.memory_timesteps, self.strip)
        print(f"\n{aligned([*rows, ['seconds of unlearning', '', f'{state.seconds:.1f}']])}\n")
        pictures = ", ".join(sorted(path.name for path in out.glob("*.png")))
        following = command("eval.py", self.args, checkpoint=loop.path)
        print(f"Look at the pictures in {out}: {pictures}; next: {following}")

    def how_alike(self, denoised: Tensor, originals: Tensor) -> str:
        """Which share of the T-shirts came back, or how many decibels; and the similarity."""
        similarity = forgetting.similarity(denoised, originals).mean()
        if self.mnist:
            return f"{forgetting.is_copy(denoised, originals).float().mean():.0%} ({similarity:.2f})"
        return f"{forgetting.psnr(denoised, originals).mean():.1f} dB ({similarity:.2f})"
