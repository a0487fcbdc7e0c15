"""Measuring one run: which model it is, its samples, and what each metric says about it, as entries of its results."""

import hashlib
import json
import statistics
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import save_image
from tqdm import tqdm

from minisiss.data.digits import ASSETS, BUNDLED, held_out_digits
from minisiss.data.training_set import draw, load_training_set, step_generator, to_float
from minisiss.errors import UserError
from minisiss.machine.command_line import read_config
from minisiss.machine.device import at_precision
from minisiss.machine.ranks import ALONE, World
from minisiss.metrics import classifier, colour, forgetting
from minisiss.metrics.likelihood import bits_per_dimension
from minisiss.metrics.quality import SPLITS, Moments, frechet_distance, inception_score, moments
from minisiss.metrics.samples import draw_samples
from minisiss.runs.checkpoint import load_any
from minisiss.runs.files import read_tensors, write_atomically
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
        return self.settings.get("method") or ("retrained" if self.settings["exclude_forget"] else "pretrained")


def one_model(args: Namespace) -> Run:
    """The model of --checkpoint, which need not say how it was made."""
    found = load_any(args.checkpoint, args.memory_timesteps, torch.device("cpu"))
    shape, settings = found.model.config.image_shape, {"method": args.checkpoint}
    return Run(args.checkpoint, None, shape, args.checkpoint, "", settings, None, None)


def find_run(name: str, timesteps: list[int], image_shape: tuple[int, int, int] | None = None) -> Run | None:
    """The run in a directory; None for the directory of an evaluation.

    Raises UserError where there is no run, one that was cut short, or one of another `image_shape`.
    """
    if name == BUNDLED:
        # A hidden directory: runs/*/ does not match it, and the package's own may be read-only.
        directory, checkpoint, path = Path("runs/.bundled"), BUNDLED, ASSETS / "mnist-small.pt"
    else:
        directory = Path(name)
        if "runs" in read_config(name):
            return None
        path = directory / "model.pt"
        checkpoint = str(path)
        if not path.exists():
            raise UserError(f"{name}: the run was cut short, it has no model.pt")
    found = load_any(checkpoint, timesteps, torch.device("cpu"))
    made_by, shape = found.made_by, found.model.config.image_shape
    if image_shape and shape != image_shape:
        makes, wanted = ("×".join(map(str, sides)) for sides in (shape, image_shape))
        raise UserError(f"{name}: makes pictures of {makes}, the others and the data have {wanted}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    try:
        of = made_by["settings"], made_by["steps"], made_by["seconds"]
        run = Run(name.rstrip("/"), directory, shape, checkpoint, digest, *of)
        total, script, numbers = run.settings["steps"], made_by["script"], (int, float)
        if not (type(run.steps) is type(total) is int and type(run.seconds) in numbers and type(run.method) is str):
            raise TypeError
    except (KeyError, TypeError, AttributeError) as error:
        what = "does not say how it was made; it is not from train_ddpm.py or unlearn.py"
        raise UserError(f"{path}: {what}") from error
    if run.steps < total:
        again = f"continue it with: python {script} --resume {name}"
        raise UserError(f"{name}: the run was cut short at step {run.steps} of {total}; {again}")
    return run


class Evaluation:
    """What the runs of an evaluation are all measured by. A look at one model takes less than a comparison of runs.

    Raises UserError, before anything is measured, for data or networks that are not there.
    """

    def __init__(self, args: Namespace, image_shape: tuple[int, int, int], device: torch.device, world: World) -> None:
        self.args, self.shape, self.device, self.world = args, image_shape, device, world
        self.thorough, self.middle = bool(args.runs), sorted(args.memory_timesteps)[len(args.memory_timesteps) // 2]
        self.sscd = args.sscd and colour.load_torchscript(args.sscd, "--sscd", colour.SSCD, device)
        self.inception = args.inception and colour.load_torchscript(
            args.inception, "--inception", colour.INCEPTION, device
        )
        data = load_training_set(args, image_shape, device, world)
        self.forgotten = data.name
        self.originals, self.sets = data.originals(args.draws), {"forget set": data.forget, "kept": data.keep}
        self.classifier, self.kept = None, None if args.data == "mnist" else data.kept()
        if args.data == "mnist" and self.thorough:
            self.sets["held out"] = held_out_digits(args.data_root).to(device)
            self.classifier, self.real = classifier.load_classifier()
            self.classifier = self.classifier.to(device)
        if self.inception:
            real = draw(data.keep, args.samples, step_generator(args.seed, 0, device))
            self.kept_moments = moments(colour.inception_features(self.inception, real))
        self.features: list[Moments] = []  # of each run's samples, T-shirts included
        self.first = torch.zeros(0)  # samples

    def measure(self, run: Run, say: Callable[[str], None]) -> Results:
        """Every metric of a run; `say` is told what is being measured."""
        args, base = self.args, load_any(run.checkpoint, self.args.memory_timesteps, self.device)
        predict = at_precision(base.model, self.device, args.precision, args.compile)
        result = {"run": run.name, "method": run.method, "steps": run.steps, "seconds": run.seconds}

        say(f"{run.name}: samples")
        samples = kept_samples(
            run, predict, base.schedule, args.samples, self.shape,
            steps=args.sampling_steps, eta=args.eta, seed=args.seed, precision=args.precision, world=self.world,
        )  # fmt: skip
        self.first = samples[:256]
        if args.data == "mnist" and args.samples:
            copies = forgetting.is_copy(samples, self.originals[:1])
            result |= tshirts(copies)
        if self.classifier:
            features, probabilities = (part.cpu() for part in classifier.classify(self.classifier, samples))
            result |= quality(features, probabilities, copies.cpu(), self.real)
            self.features.append(moments(features))
        if self.inception:
            seen = moments(colour.inception_features(self.inception, samples))
            result["fid"] = frechet_distance(seen, self.kept_moments)

        say(f"{run.name}: memory")
        for t in tqdm(args.memory_timesteps, desc="noise and denoise", unit="timestep", leave=False):
            _, back = forgetting.noise_and_denoise(predict, base.schedule, self.originals, t, args.seed)
            result[f"memory_{t}"] = memory(back, self.originals, self.classifier)
            if self.sscd and t == self.middle:
                result["copy_similarity"] = colour.copy_similarity(self.sscd, back, self.originals).mean().item()
            if self.kept is not None:
                _, back = forgetting.noise_and_denoise(predict, base.schedule, self.kept, t, args.seed)
                result[f"kept_memory_{t}"] = memory(back, self.kept)

        if self.thorough:
            say(f"{run.name}: likelihood")
            result |= likelihood(base.model, base.schedule, self.originals[:1], args.seed)
            say(f"{run.name}: losses")
            result |= losses(predict, base.schedule, self.sets, args.seed)
        return result | {"settings": run.settings}

    def add_distances(self, results: list[Results]) -> None:
        """Add to each run's results the distance of its samples to the retrained model's, where there are digits."""
        if self.features:
            add_distances(results, self.features)

    def save_samples(self, path: Path) -> None:
        """A picture of the first samples of a look at one model."""
        if not self.thorough and len(self.first):
            save_image(self.first, path, nrow=16, normalize=True, value_range=(-1, 1))


def kept_samples(
    run: Run, model: Model, schedule: NoiseSchedule, count: int, image_shape: tuple[int, int, int], *,
    steps: int, eta: float, seed: int, precision: str, world: World = ALONE,
) -> Tensor:  # fmt: skip
    """Samples of a run's model: [count, C, H, W] in [−1, 1], from the run's directory if they are there.

    The file's name is a digest of the checkpoint's content and of everything else that makes the samples what they
    are, so that a model that has changed does not meet the samples of the old one.
    """
    device = schedule.gamma.device
    made_by = json.dumps([run.digest, count, *image_shape, steps, eta, seed, precision, device.type])
    path = run.directory and run.directory / f"samples-{hashlib.sha256(made_by.encode()).hexdigest()[:16]}.pt"
    try:
        samples = read_tensors(path)
        if (samples.shape, samples.dtype) != ((count, *image_shape), torch.uint8):
            samples = None
    except Exception:  # not there, or damaged: a file can fail anywhere in torch's readers
        samples = None
    if world.max(samples is None):  # all ranks draw as soon as one of them has to
        how = dict(seed=seed, steps=steps, eta=eta, world=world, title=f"{run.name}: sampling")
        samples = draw_samples(model, schedule, count, image_shape, **how)

        def keep() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda file: torch.save(samples, file))

        if path:
            world.on_rank_0(keep)
    return to_float(samples.to(device))


def tshirts(copies: Tensor) -> Results:
    """How many samples are the T-shirt, from the decisions about each: [N] bool."""
    found, count = int(copies.sum()), len(copies)
    interval = list(forgetting.wilson_interval(found, count))
    return {"samples": count, "tshirts": found, "tshirt_rate": found / count, "tshirt_rate_95": interval}


def memory(denoised: Tensor, originals: Tensor, network: classifier.DigitClassifier | None = None) -> Results:
    """How alike images that were noised and denoised are to what they were: in pixels, and in a classifier's features.

    denoised: [N, C, H, W] and originals: [1 or N, C, H, W], both in [−1, 1]. "comes_back", the share within the
    T-shirt's criterion, only for pictures of the size that it was made for.
    """
    measures = {"similarity": forgetting.similarity, "psnr": forgetting.psnr}
    found = {name: measure(denoised, originals).mean().item() for name, measure in measures.items()}
    if denoised.shape[1:] == (1, 28, 28):
        found["comes_back"] = forgetting.is_copy(denoised, originals).float().mean().item()
    if network:
        features, original = (classifier.classify(network, images)[0] for images in (denoised, originals))
        found["feature_similarity"] = F.cosine_similarity(features, original).mean().item()
    return found


def quality(features: Tensor, probabilities: Tensor, copies: Tensor, real: Moments) -> Results:
    """Inception score and Fréchet distance to real digits, of the samples that are not the T-shirt.

    features: [N, D]; probabilities: [N, 10]; copies: [N] bool. None where fewer are left than an inception score
    needs.
    """
    features, probabilities = features[~copies], probabilities[~copies]
    enough = len(features) >= SPLITS
    score, std = inception_score(probabilities) if enough else (None, None)
    distance = frechet_distance(moments(features), real) if enough else None
    left_out = int(copies.sum())
    return {"left_out": left_out, "inception_score": score, "inception_score_std": std, "frechet": distance}


def likelihood(model: UNet, schedule: NoiseSchedule, image: Tensor, seed: int) -> Results:
    """Bits per dimension of the image to forget, in float32; None where the ODE cannot be solved."""
    try:
        bits, error = bits_per_dimension(model, schedule, image, seed=seed)
    except ArithmeticError:  # a model gone to pieces
        bits, error = None, None
    return {"nll": bits, "nll_error": error}


def losses(predict: Model, schedule: NoiseSchedule, sets: dict[str, Tensor], seed: int) -> Results:
    """The denoising loss of sets of images, [N, C, H, W] uint8 each (or folders), by range of timesteps."""
    return {
        "losses": {
            name: forgetting.denoising_loss(predict, schedule, images, LOSS_IMAGES, buckets=LOSS_BUCKETS, seed=seed)
            for name, images in sets.items()
        }
    }


def add_distances(results: list[Results], features: list[Moments]) -> None:
    """Add to each run's results the Fréchet distance of its samples to those of the retrained model, "to_retrained".

    features: the moments of each run's samples, T-shirts included. With several retrained models it is the mean
    distance to them, for one of them to the others; None where there is no (other) retrained model.
    """
    retrained = [place for place, result in enumerate(results) if result["method"] == "retrained"]
    for place, result in enumerate(results):
        distances = [frechet_distance(features[place], features[other]) for other in retrained if other != place]
        result["to_retrained"] = statistics.mean(distances) if distances else None
