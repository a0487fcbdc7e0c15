"""What unlearn.py shows: a model before and after, and what it remembers in between."""

import shlex
from argparse import Namespace

import torch
from torch import Tensor

from minisiss.lab import metrics, pictures, ranks
from minisiss.lab.checkpoint import Checkpoint
from minisiss.lab.cli import UserError
from minisiss.lab.data import load_training_set, note_forgotten_before
from minisiss.lab.evaluation import Evaluation, cell
from minisiss.lab.run import Run, write_json
from minisiss.schedule import Model

LOOK_IMAGES, LOOK_DRAWS = 48, 8  # few, and the same at every look: the differences are the model's
SHOWN = 12  # samples in forgetting.gif, and in a row of before_after.png


class BeforeAfter:
    """Measures a model before, during and after unlearning."""

    prompt: Tensor | None = None  # the network has none

    def __init__(self, args: Namespace, base: Checkpoint, model: Model,
                 device: torch.device) -> None:
        """base: the checkpoint that the unlearning begins with; model: its network."""
        if args.prompt:
            raise UserError(f"--prompt '{args.prompt}': is for --preset prompts")
        self.args, self.schedule = args, base.schedule
        self.data = load_training_set(args, base.model.config.image_shape, device)
        self.evaluation = Evaluation(args, self.data, device)
        note_forgotten_before(self.data, set(base.forgotten) - set(args.forget))
        self.film: dict[int, tuple[Tensor, Tensor]] = {}

    def before(self, model: Model) -> None:
        """Measure the model before unlearning, and choose which samples the film shows."""
        evaluation = self.evaluation
        self.figures_before = evaluation.figures(model, self.schedule, "before")
        self.samples_before, self.back_before = evaluation.samples, evaluation.back
        self.copies = evaluation.copies()
        copies, others = self.copies.nonzero().flatten(), (~self.copies).nonzero().flatten()
        self.shown = torch.cat([copies[: SHOWN // 2], others])[:SHOWN].tolist()

    def look(self, run: Run, model: Model) -> None:
        """Log what comes back of A from the middle timestep, and how well noise is predicted."""
        evaluation, schedule = self.evaluation, self.schedule
        some = evaluation.originals["memory"][:LOOK_DRAWS]
        back = evaluation.recall(model, schedule, some, evaluation.middle)
        figures = {"memory": metrics.similarity(back, some).mean()}
        for name, images in (("kept", self.data.keep), ("forget", self.data.forget)):
            loss = metrics.denoising_loss(model, schedule, images, LOOK_IMAGES)
            figures[f"loss_on_{name}"] = loss
        run.log(figures, shown=("memory",))
        one = some[:1]
        strip = [evaluation.recall(model, schedule, one, t) for t in self.args.memory_timesteps]
        samples = evaluation.sample(model, schedule, self.shown, "looking")
        self.film[run.step] = samples, torch.cat(strip).cpu()

    def after(self, run: Run, model: Model) -> None:
        """Measure again; print the table, and write results.json and the pictures."""
        evaluation = self.evaluation
        figures = evaluation.figures(model, self.schedule, "after")
        if ranks.rank() > 0:
            return
        real = evaluation.real_figures()
        columns = {"before": self.figures_before, "after": figures}
        if real:
            columns["real digits"] = real
        rows = [[f"forgetting: {self.data.name}", *columns]]
        for name in self.figures_before | figures:
            rows.append([name, *(cell(name, [part.get(name)]) for part in columns.values())])
        write_json(run.out / "results.json", {"before": self.figures_before, "after": figures})
        timesteps, originals = self.args.memory_timesteps, evaluation.originals["memory"]
        page = pictures.samples_before_after(self.samples_before, evaluation.samples, self.copies)
        page += pictures.memory_before_after(
            originals, self.back_before, evaluation.back, timesteps)
        pictures.sheet(page).save(run.out / "before_after.png")
        pictures.save_gif(run.out / "forgetting.gif", timesteps, self.film)
        print(f"\n{pictures.aligned(rows)}\n")
        print(f"{run.step} steps of {self.args.method} took {run.seconds:.0f} s.")
        print(f"Look at {run.out}/before_after.png and forgetting.gif.")
        if evaluation.is_mnist:
            print(f"Next: python eval.py {shlex.quote(str(run.out))}")
