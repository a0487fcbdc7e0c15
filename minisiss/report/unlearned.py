"""What unlearn.py shows: samples and memory before and after, and what is remembered in between."""

import itertools
from argparse import Namespace

import torch
from torch import Tensor
from tqdm import tqdm

from minisiss.data.training_set import TrainingSet, to_float
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

    def __init__(self, args: Namespace, data: TrainingSet, model: Model, schedule: NoiseSchedule, world: World) -> None:
        self.args, self.data, self.model, self.schedule, self.world = args, data, model, schedule, world
        self.forgotten, self.mnist, self.warned = data.originals(args.draws), args.data == "mnist", False
        self.sets = {data.name: self.forgotten}
        if not self.mnist:  # a model of few pictures remembers those it keeps, one of many digits does not
            self.sets["kept pictures"] = data.kept()
        self.middle = sorted(args.memory_timesteps)[len(args.memory_timesteps) // 2]
        self.strip: dict[int, Tensor] = {}

    def draw_before(self) -> None:
        """Draw samples, and what is remembered, from the model as it is now."""
        self.before = self.samples("before"), self.memories("before")

    def samples(self, when: str) -> Tensor:
        """Samples from the same noise at every call: [samples, C, H, W] in [−1, 1]."""
        args, shape = self.args, tuple(self.forgotten.shape[1:])
        drawn = draw_samples(
            self.model, self.schedule, args.samples, shape, seed=args.seed, steps=args.sampling_steps, eta=args.eta,
            world=self.world, title=f"sampling {when}",
        )  # fmt: skip
        return to_float(drawn)

    def recall(self, originals: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
        """Images noised to a timestep, and what the model makes of them."""
        return forgetting.noise_and_denoise(self.model, self.schedule, originals, timestep, self.args.seed)

    def memories(self, when: str) -> dict[str, Memories]:
        """What comes back of each set of images at each timestep."""
        return {
            name: {
                t: self.recall(originals, t)
                for t in tqdm(self.args.memory_timesteps, desc=f"{name} {when}", unit="timestep", leave=False)
            }
            for name, originals in self.sets.items()
        }

    def look(self, loop: Loop) -> None:
        """Log what is remembered, by the forget set noised to the middle timestep, and how well noise is predicted."""
        first = loop.state.step == 0
        _, back = self.before[1][self.data.name][self.middle] if first else self.recall(self.forgotten, self.middle)
        memory = forgetting.similarity(back, self.forgotten).mean()
        (kept,), (forget,) = (
            forgetting.denoising_loss(self.model, self.schedule, images, LOOK_IMAGES)
            for images in (self.data.keep, self.data.forget)
        )
        figures = {"memory": memory, "memory_timestep": self.middle, "loss_on_kept": kept, "loss_on_forget": forget}
        loop.log(figures, shown=("memory",))
        one = self.forgotten[:1]
        self.strip[loop.state.step] = torch.cat([self.recall(one, t)[1] for t in self.args.memory_timesteps])

    def warn(self, loop: Loop, figures: dict[str, float]) -> None:
        """Say once if hardly an image of a batch counts."""
        few = [name for name in ("ess_keep", "ess_forget") if figures.get(name, FEW) < FEW]
        if few and not self.warned:
            what = "a batch in which hardly one image counts; try --lam 0.5 or a larger --batch-size"
            loop.bar.write(f"warning: step {loop.state.step}: {few[0]} is {figures[few[0]]:.1f}, {what}")
            self.warned = True

    def finish(self, loop: Loop) -> None:
        """Draw and measure again; print the table, and write the pictures."""
        (before, memories_before), (after, memories_after) = self.before, (self.samples("after"), self.memories("after"))
        if self.world.rank > 0:
            return
        rows = [["", "before", "after"]]
        copies = torch.zeros(len(before), dtype=torch.bool)
        if self.args.samples and self.mnist:
            tshirt = self.forgotten[:1].cpu()
            copies = forgetting.is_copy(before, tshirt)
            rates = [share.float().mean().item() for share in (copies, forgetting.is_copy(after, tshirt))]
            rows.append([f"T-shirts among {self.args.samples:,} samples", *(f"{rate:.2%}" for rate in rates)])
            rates = dict(zip(("tshirt_rate_before", "tshirt_rate"), rates, strict=True))
            loop.metrics.write(
                step=loop.state.step, seconds=loop.state.seconds, samples=self.args.samples, **rates
            )
        for (name, originals), t in itertools.product(self.sets.items(), self.args.memory_timesteps):
            cells = [self.how_alike(of[name][t][1], originals) for of in (memories_before, memories_after)]
            rows.append([f"{name} noised to t = {t} comes back (similarity)", *cells])
        rows.append(["seconds of unlearning", "", f"{loop.state.seconds:.1f}"])
        print(f"\n{aligned(rows)}\n")

        save_before_after(loop.out / "before_after.png", before, after, copies)
        names = self.data.name, self.forgotten
        save_memory(loop.out / "memory.png", names[1], memories_before[names[0]], memories_after[names[0]])
        save_strip(loop.out / "memory_by_step.png", self.args.memory_timesteps, self.strip)
        pictures = ", ".join(sorted(path.name for path in loop.out.glob("*.png")))
        print(f"Look at the pictures in {loop.out}: {pictures}; next: python eval.py --checkpoint {loop.path}")

    def how_alike(self, denoised: Tensor, originals: Tensor) -> str:
        """Which share of the T-shirts came back, or how many decibels; and the similarity."""
        similarity = forgetting.similarity(denoised, originals).mean()
        if self.mnist:
            return f"{forgetting.is_copy(denoised, originals).float().mean():.0%} ({similarity:.2f})"
        return f"{forgetting.psnr(denoised, originals).mean():.1f} dB ({similarity:.2f})"
