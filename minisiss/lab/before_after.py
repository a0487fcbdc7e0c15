"""What unlearn.py shows: a model before and after, and what it remembers in between."""

import shlex
from argparse import Namespace

import torch
from PIL import Image

from minisiss.lab import machine, metrics, pictures
from minisiss.lab.checkpoint import Checkpoint
from minisiss.lab.cli import UserError
from minisiss.lab.data import load_training_set, note_forgotten_before
from minisiss.lab.evaluation import Evaluation, cell
from minisiss.lab.prompted import GUIDANCE, Prompted
from minisiss.lab.run import Run, write_json
from minisiss.sampling import guided
from minisiss.schedule import Model

LOOK_DRAWS = 8  # few, and the same at every look: only the model differs
SHOWN = 12  # samples in the pictures: at most half of them to be forgotten, then others


class BeforeAfter:
    """Measures a model before, during and after unlearning."""

    def __init__(self, args: Namespace, base: Checkpoint, model: Model,
                 device: torch.device) -> None:
        """base: the checkpoint that the unlearning begins with; model: its network."""
        self.args, self.schedule = args, base.schedule
        if args.data == "prompts":
            self.evaluation = Prompted(args, base, model, device)
        elif args.prompt:
            raise UserError(f"--prompt '{args.prompt}': is for --preset prompts")
        else:
            data = load_training_set(args, base.model.config.image_shape, device)
            note_forgotten_before(data, set(base.forgotten) - set(args.forget))
            self.evaluation = Evaluation(args, data, device)
        self.data, self.prompt = self.evaluation.data, self.evaluation.prompt
        self.film: list[Image.Image] = []
        self.times = "t = " + ", ".join(map(str, args.memory_timesteps))

    def before(self, model: Model) -> None:
        """Measure the model before unlearning, and choose which samples the pictures show."""
        evaluation = self.evaluation
        self.figures_before = evaluation.figures(model, self.schedule, "before")
        self.samples_before, self.back_before = evaluation.samples, evaluation.back
        found = evaluation.copies(evaluation.samples)
        copies, others = found.nonzero().flatten(), (~found).nonzero().flatten()
        self.shown = torch.cat([copies[: SHOWN // 2], others])[:SHOWN].tolist()

    def look(self, run: Run, model: Model) -> None:
        """Log how alike the picture comes back and how well noise is predicted, and film it."""
        evaluation, schedule = self.evaluation, self.schedule
        predict = guided(model, self.prompt)
        kept = metrics.denoising_loss(predict, schedule, self.data.keep)
        forget = metrics.denoising_loss(predict, schedule, self.data.forget)
        sampler = guided(model, self.prompt, GUIDANCE)
        some = evaluation.originals["memory"][:LOOK_DRAWS]
        back = evaluation.recall(sampler, schedule, some, evaluation.middle)
        memory = metrics.similarity(back, some).mean()
        figures = {"memory": memory, "loss_on_kept": kept, "loss_on_forget": forget}
        run.log(figures, shown=("memory",))

        rows = [f"step {run.step}: the same noise each time"]
        samples = evaluation.sample(sampler, schedule, self.shown, "looking")
        for part in samples.split(SHOWN // 2):
            if len(part):
                rows.append(("samples", part))
        times = self.args.memory_timesteps
        back = [evaluation.recall(sampler, schedule, some[:1], t) for t in times]
        rows += [f"noised to {self.times}, and denoised:", ("memory", torch.cat(back))]
        self.film.append(pictures.sheet(rows))

    def after(self, run: Run, model: Model) -> None:
        """Measure again; print the table, and write results.json and the pictures."""
        before, after = self.figures_before, self.evaluation.figures(model, self.schedule, "after")
        if machine.rank() > 0:
            return
        rows = [[f"forgetting: {self.data.name}", "before", "after"]]
        for name in before | after:
            rows.append([name, cell(name, [before.get(name)]), cell(name, [after.get(name)])])
        write_json(run.out / "results.json", {"before": before, "after": after})
        pictures.sheet(self.page()).save(run.out / "before_after.png")
        pictures.save_gif(run.out / "forgetting.gif", self.film)
        print(f"\n{pictures.aligned(rows)}\n")
        print(f"{run.step} steps of {self.args.method} took {run.seconds:.0f} s.")
        print(f"Look at {run.out}/before_after.png and forgetting.gif.")
        if self.evaluation.is_mnist:
            print(f"Next: python eval.py {shlex.quote(str(run.out))}")

    def page(self) -> list[pictures.Row]:
        """The rows of before_after.png: samples, and then the first three pictures to forget."""
        evaluation = self.evaluation
        rows: list[pictures.Row] = []
        if self.shown:
            rows.append("Samples before, and what the same noise gives after unlearning")
            rows.append(("before", self.samples_before[self.shown]))
            rows.append(("after", evaluation.samples[self.shown]))
        rows.append(f"What is to be forgotten, noised to {self.times}, and denoised again")
        for number, original in enumerate(evaluation.different[:3]):
            rows.append(("original", original[None]))
            for word, back in (("before", self.back_before), ("after", evaluation.back)):
                images = [back["memory", t][number] for t in self.args.memory_timesteps]
                rows.append((word, torch.stack(images)))
        return rows
