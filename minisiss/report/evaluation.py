"""Measuring one run: which model it is, its samples, and its results, what each metric says about it."""

import hashlib
import json
import statistics
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from minisiss.data.digits import ASSETS, BUNDLED, held_out_digits
from minisiss.data.training_set import draw, load_training_set, step_generator, to_float
from minisiss.errors import UserError
from minisiss.machine.command_line import command, read_config
from minisiss.machine.device import at_precision
from minisiss.machine.ranks import ALONE, World
from minisiss.metrics import classifier, colour, forgetting
from minisiss.metrics.likelihood import bits_per_dimension
from minisiss.metrics.quality import SPLITS, Moments, frechet_distance, inception_score, moments
from minisiss.metrics.samples import draw_samples
from minisiss.runs.checkpoint import load_any
from minisiss.runs.files import read_tensors, write_atomically
from minisiss.runs.pretrained import is_published
from minisiss.schedule import Model, NoiseSchedule
from minisiss.unet import UNet

Results = dict[str, Any]  # what goes into results.json
LOSS_IMAGES, LOSS_BUCKETS = 1000, 10  # of each set, in all ranges of timesteps together


@dataclass(frozen=True)
class Run:
    """A finished run of train_ddpm.py or unlearn.py, the bundled model, or a checkpoint by itself."""

    name: str  # its directory, "bundled", or the checkpoint
    directory: Path | None  # where its samples are kept, if they are
    image_shape: tuple[int, int, int]
    checkpoint: str  # what `load_any` takes
    digest: str  # of the checkpoint's content
    settings: dict[str, Any]
    steps: int | None
    seconds: float | None

    @property
    def method(self) -> str:
        found = self.settings
        return found.get("method") or ("retrained" if found["exclude_forget"] else "pretrained")


def one_model(args: Namespace) -> Run:
    """The model of --checkpoint, which need not say how it was made."""
    name = args.checkpoint
    shape = load_any(name, args.memory_timesteps, torch.device("cpu")).model.config.image_shape
    return Run(name, None, shape, name, "", {"method": name}, None, None)


def find_run(name: str, timesteps: list[int], image_shape: tuple[int, int, int] | None = None) -> Run | None:
    """The run in a directory; None for the directory of an evaluation.

    Raises UserError where there is no run, one that was cut short, or one of another `image_shape`.
    """
    if name == BUNDLED:
        # A hidden directory: runs/*/ does not match it, and the package's own may be read-only.
        directory, path = Path("runs/.bundled"), ASSETS / "mnist-small.pt"
    else:
        directory, path = Path(name), Path(name) / "model.pt"
        if is_published(name):
            what = f"holds no run but a published model; look at it with --checkpoint {name}"
            raise UserError(f"{name}: {what}")
        if "runs" in read_config(name):
            return None
        if not path.exists():
            raise UserError(f"{name}: the run was cut short, it has no model.pt")
    found = load_any(str(path), timesteps, torch.device("cpu"))
    made_by, shape = found.made_by, found.model.config.image_shape
    if image_shape and shape != image_shape:
        makes, wanted = ("×".join(map(str, sides)) for sides in (shape, image_shape))
        raise UserError(f"{name}: makes pictures of {makes}, the others and the data have {wanted}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    try:
        script, *origin = (made_by[key] for key in ("script", "settings", "steps", "seconds"))
        run = Run(name.rstrip("/"), directory, shape, str(path), digest, *origin)
        total = run.settings["steps"]
        kinds = type(total), type(run.steps), type(run.method)
        if kinds != (int, int, str) or type(run.seconds) not in (int, float):
            raise TypeError
    except (KeyError, TypeError, AttributeError) as error:
        what = "does not say how it was made; it is not from train_ddpm.py or unlearn.py"
        raise UserError(f"{path}: {what}") from error
    if run.settings.get("data") == "prompts":
        raise UserError(f"{name}: a run on prompts; what a prompt brings back is shown by unlearn.py")
    if run.steps < total:
        again = f"continue it with: {command(script, resume=name)}"
        raise UserError(f"{name}: the run was cut short at step {run.steps} of {total}; {again}")
    return run


def find_runs(args: Namespace, world: World) -> tuple[list[Run], list[UserError]]:
    """The finished runs among the directories, and what is wrong with the others. Pictures come in the size
    of the first model. Raises UserError where there are too few samples to compare runs."""
    if args.samples < SPLITS:
        needs = f"an inception score over {SPLITS} splits needs at least {SPLITS}"
        raise UserError(f"--samples {args.samples}: {needs}")
    found, wrong, shape = [], [], (1, 28, 28) if args.data == "mnist" else None
    for name in args.runs:
        try:
            one = world.on_rank_0(partial(find_run, name, args.memory_timesteps, shape))
            found += [one] if one else []  # runs/*/ matches evaluations too
            shape = found[0].image_shape if found else shape
        except UserError as error:
            wrong.append(error)
    return found, wrong


class Evaluation:
    """What all runs are measured by. A look at one model takes less than a comparison of runs.

    Raises UserError, before anything is measured, for data or networks that are not there.
    """

    def __init__(self, args: Namespace, image_shape: tuple[int, int, int], device: torch.device,
                 world: World) -> None:
        self.args, self.device, self.world = args, device, world
        self.thorough, self.mnist = bool(args.runs), args.data == "mnist"
        load = colour.load_torchscript
        self.sscd = args.sscd and load(args.sscd, "--sscd", colour.SSCD, device)
        self.inception = args.inception and load(args.inception, "--inception", colour.INCEPTION, device)
        data = load_training_set(args, image_shape, device, world)
        self.forgotten, self.originals = data.measured(args.draws)
        self.sets = {"forget set": data.forget, "kept": data.keep}
        self.remembered = {"memory": self.originals} | ({} if self.mnist else {"kept_memory": data.kept()})
        self.classifier = None
        if self.mnist and self.thorough:
            self.sets["held out"] = held_out_digits(args.data_root).to(device)
            network, self.real = classifier.load_classifier()
            self.classifier = network.to(device)
        if self.inception:
            real = draw(data.keep, args.samples, step_generator(args.seed, 0, device))
            self.kept_moments = moments(colour.inception_features(self.inception, real))
        self.features: list[Moments] = []  # of each run's samples, T-shirts included

    def measure(self, run: Run, say: Callable[[str], None]) -> Results:
        """Every metric of a run; `say` is told what is being measured."""
        args, base = self.args, load_any(run.checkpoint, self.args.memory_timesteps, self.device)
        predict = at_precision(base.model, self.device, args.precision, args.compile)
        result = {"run": run.name, "method": run.method, "steps": run.steps, "seconds": run.seconds}

        say(f"{run.name}: samples")
        samples = kept_samples(args, run, predict, base.schedule, self.world)
        self.first = samples[:256]  # for a picture
        if self.mnist and args.samples:
            copies = forgetting.is_copy(samples, self.originals[:1])
            found, count = int(copies.sum()), len(copies)
            result |= {"samples": count, "tshirts": found, "tshirt_rate": found / count,
                       "tshirt_rate_95": list(forgetting.wilson_interval(found, count))}
        if self.classifier:
            features, probabilities = (part.cpu() for part in classifier.classify(self.classifier, samples))
            result |= quality(features, probabilities, copies.cpu(), self.real)
            self.features.append(moments(features))
        if self.inception:
            seen = moments(colour.inception_features(self.inception, samples))
            result["fid"] = frechet_distance(seen, self.kept_moments)

        say(f"{run.name}: memory")
        middle = statistics.median_high(args.memory_timesteps)
        for t in tqdm(args.memory_timesteps, desc="noise and denoise", unit="timestep", leave=False):
            for name, images in self.remembered.items():
                _, back = forgetting.noise_and_denoise(predict, base.schedule, images, t, args.seed)
                result[f"{name}_{t}"] = memory(back, images, self.classifier)
                if self.sscd and t == middle and name == "memory":
                    alike = colour.copy_similarity(self.sscd, back, images)
                    result["copy_similarity"] = alike.mean().item()
        if self.thorough:
            say(f"{run.name}: likelihood")
            result |= likelihood(base.model, base.schedule, self.originals[:1], args.seed)
            say(f"{run.name}: losses")
            result["losses"] = {
                name: forgetting.denoising_loss(
                    predict, base.schedule, images, LOSS_IMAGES, buckets=LOSS_BUCKETS, seed=args.seed)
                for name, images in self.sets.items()}
        return result | {"settings": run.settings}


def kept_samples(args: Namespace, run: Run, model: Model, schedule: NoiseSchedule,
                 world: World = ALONE) -> Tensor:
    """--samples of a run's model: [N, C, H, W] in [−1, 1], from the run's directory if they are there.

    The file's name is a digest of all that the samples depend on, the content of the checkpoint included.
    """
    device, shape = schedule.gamma.device, (args.samples, *run.image_shape)
    sampler = "trailing" if args.eta else "2M"  # samples of an earlier version are drawn again
    made_by = json.dumps([
        run.digest, *shape, args.sampling_steps, args.eta, sampler, args.seed, args.precision, device.type])
    path = run.directory and run.directory / f"samples-{hashlib.sha256(made_by.encode()).hexdigest()[:16]}.pt"
    try:
        samples = read_tensors(path)
        there = (samples.shape, samples.dtype) == (shape, torch.uint8)
    except Exception:  # not there, or damaged: a file can fail anywhere in torch's readers
        there = False
    if world.max(not there):  # all ranks draw as soon as one of them has to
        samples = draw_samples(
            model, schedule, args.samples, run.image_shape, seed=args.seed, steps=args.sampling_steps,
            eta=args.eta, world=world, title=f"{run.name}: sampling")

        def keep() -> None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, lambda file: torch.save(samples, file))
            except (OSError, UserError) as error:  # a colleague's directory: they are drawn again next time
                tqdm.write(f"warning: {run.name}: its samples are not kept ({error})", file=sys.stderr)

        if path:
            world.on_rank_0(keep)
    return to_float(samples.to(device))


def memory(denoised: Tensor, originals: Tensor, network: classifier.DigitClassifier | None = None) -> Results:
    """How alike denoised images are to their originals, in pixels and in a classifier's features.

    denoised: [N, C, H, W] and originals: [1 or N, C, H, W], both in [−1, 1]. "comes_back", the share within
    the T-shirt's criterion, only for pictures of the size that it was made for.
    """
    measures = {"similarity": forgetting.similarity, "psnr": forgetting.psnr}
    if denoised.shape[1:] == (1, 28, 28):
        measures["comes_back"] = forgetting.is_copy
    found = {name: measure(denoised, originals).float().mean().item() for name, measure in measures.items()}
    if network:
        features, original = (classifier.classify(network, images)[0] for images in (denoised, originals))
        found["feature_similarity"] = F.cosine_similarity(features, original).mean().item()
    return found


def quality(features: Tensor, probabilities: Tensor, copies: Tensor, real: Moments) -> Results:
    """Inception score and Fréchet distance to real digits, of the samples that are not the T-shirt.

    features: [N, D]; probabilities: [N, 10]; copies: [N] bool. None where fewer than `SPLITS` are left.
    """
    score, std, distance, kept = None, None, None, ~copies
    if kept.sum() >= SPLITS:
        score, std = inception_score(probabilities[kept])
        distance = frechet_distance(moments(features[kept]), real)
    left_out = int(copies.sum())
    return {"left_out": left_out, "inception_score": score, "inception_score_std": std, "frechet": distance}


def likelihood(model: UNet, schedule: NoiseSchedule, image: Tensor, seed: int) -> Results:
    """Bits per dimension of the image to forget, in float32; None where the ODE cannot be solved."""
    try:
        bits, error = bits_per_dimension(model, schedule, image, seed=seed)
    except ArithmeticError:  # a model gone to pieces
        bits, error = None, None
    return {"nll": bits, "nll_error": error}


def add_distances(results: list[Results], features: list[Moments]) -> None:
    """Add the Fréchet distance of each run's samples to those of the retrained model, "to_retrained".

    features: the moments of each run's samples, T-shirts included; without digits none, and nothing is added.
    The mean over several retrained models, of one of them over the others; None without an(other) one.
    """
    retrained = [place for place, result in enumerate(results) if result["method"] == "retrained"]
    for place, (result, own) in enumerate(zip(results, features, strict=False)):
        distances = [frechet_distance(own, features[other]) for other in retrained if other != place]
        result["to_retrained"] = statistics.mean(distances) if distances else None
