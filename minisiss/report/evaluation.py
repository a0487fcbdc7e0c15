"""Measuring one run: which model it is, its samples, and what each metric says about it, as entries of its results."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from minisiss.data.digits import ASSETS, BUNDLED
from minisiss.data.training_set import to_float, to_uint8
from minisiss.errors import UserError
from minisiss.machine.command_line import read_config
from minisiss.machine.ranks import ALONE, World
from minisiss.metrics import forgetting
from minisiss.metrics.classifier import DigitClassifier, classify
from minisiss.metrics.likelihood import bits_per_dimension
from minisiss.metrics.quality import SPLITS, Moments, frechet_distance, inception_score, moments
from minisiss.runs.checkpoint import load_any
from minisiss.runs.files import read_tensors, write_atomically
from minisiss.sampling import sample_batches
from minisiss.schedule import Model, NoiseSchedule
from minisiss.unet import UNet

Results = dict[str, Any]  # what goes into results.json
LOSS_IMAGES, LOSS_BUCKETS = 1000, 10  # of each set, in all ranges of timesteps together


@dataclass(frozen=True)
class Run:
    """A finished run of train_ddpm.py or unlearn.py, or the bundled model."""

    name: str  # its directory, or "bundled"
    directory: Path  # where its samples are kept
    image_shape: tuple[int, int, int]
    checkpoint: str  # what `load_any` takes
    digest: str  # of the checkpoint's content
    settings: dict[str, Any]
    steps: int
    seconds: float

    @property
    def method(self) -> str:
        return self.settings.get("method") or ("retrained" if self.settings["exclude_forget"] else "pretrained")


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
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        run = Run(name.rstrip("/"), directory, shape, checkpoint, digest, made_by["settings"], made_by["steps"], made_by["seconds"])
        total, script, _ = run.settings["steps"], made_by["script"], run.method
        if not (type(run.steps) is type(total) is int and type(run.seconds) in (int, float) and isinstance(run.method, str)):
            raise TypeError
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: does not say how it was made; it is not from train_ddpm.py or unlearn.py") from error
    if run.steps < total:
        raise UserError(f"{name}: the run was cut short at step {run.steps} of {total}; continue it with: python {script} --resume {name}")
    return run


def draw_samples(
    run: Run, predict: Model, schedule: NoiseSchedule, count: int, image_shape: torch.Size, *,
    steps: int, eta: float, seed: int, precision: str, world: World = ALONE,
) -> Tensor:  # fmt: skip
    """Samples of a run's model: [count, C, H, W] in [−1, 1], rounded to 8 bits, from the run's directory if they are there.

    The file's name is a digest of the checkpoint's content and of everything else that makes the samples what they are,
    so that a model that has changed does not meet the samples of the old one.
    """
    device = schedule.gamma.device
    made_by = json.dumps([run.digest, count, *image_shape, steps, eta, seed, precision, device.type])
    path = run.directory / f"samples-{hashlib.sha256(made_by.encode()).hexdigest()[:16]}.pt"
    try:
        samples = read_tensors(path)
        if (samples.shape, samples.dtype) != ((count, *image_shape), torch.uint8):
            samples = None
    except Exception:  # not there, or damaged: a file can fail anywhere in torch's readers
        samples = None
    if not world.max(samples is None):  # all ranks draw as soon as one of them has to
        return to_float(samples.to(device))
    batches = []
    with tqdm(total=count, desc=f"{run.name}: sampling", unit="image", leave=False) as bar:
        for images in sample_batches(predict, schedule, count, image_shape, seed, steps=steps, eta=eta, world=world):
            batches.append(to_uint8(images).cpu())
            bar.update(len(images))
    samples = torch.cat(batches)

    def keep() -> None:
        run.directory.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: torch.save(samples, file))

    world.on_rank_0(keep)
    return to_float(samples.to(device))


def tshirts(copies: Tensor) -> Results:
    """How many samples are the T-shirt, from the decisions about each: [N] bool."""
    found, count = int(copies.sum()), len(copies)
    return {"samples": count, "tshirts": found, "tshirt_rate": found / count, "tshirt_rate_95": list(forgetting.wilson_interval(found, count))}


def memory(denoised: Tensor, originals: Tensor, classifier: DigitClassifier | None = None) -> Results:
    """How alike images that were noised and denoised are to what they were: in pixels, and in a classifier's features.

    denoised: [N, C, H, W] and originals: [1 or N, C, H, W], both in [−1, 1]. "comes_back", the share within the T-shirt's
    criterion, only for pictures of the size that it was made for.
    """
    found = {name: measure(denoised, originals).mean().item() for name, measure in (("similarity", forgetting.similarity), ("psnr", forgetting.psnr))}
    if denoised.shape[1:] == (1, 28, 28):
        found["comes_back"] = forgetting.is_copy(denoised, originals).float().mean().item()
    if classifier:
        features, original = (classify(classifier, images)[0] for images in (denoised, originals))
        found["feature_similarity"] = F.cosine_similarity(features, original).mean().item()
    return found


def quality(features: Tensor, probabilities: Tensor, copies: Tensor, real: Moments) -> Results:
    """Inception score and Fréchet distance to real digits, of the samples that are not the T-shirt.

    features: [N, D]; probabilities: [N, 10]; copies: [N] bool. None where fewer are left than an inception score needs.
    """
    features, probabilities = features[~copies], probabilities[~copies]
    if len(features) < SPLITS:
        return {"left_out": int(copies.sum()), "inception_score": None, "inception_score_std": None, "frechet": None}
    score, std = inception_score(probabilities)
    return {
        "left_out": int(copies.sum()), "inception_score": score, "inception_score_std": std,
        "frechet": frechet_distance(moments(features), real),
    }  # fmt: skip


def likelihood(model: UNet, schedule: NoiseSchedule, image: Tensor, seed: int) -> Results:
    """Bits per dimension of the image to forget, in float32; None where the ODE cannot be solved, as for a model gone to pieces."""
    try:
        bits, error = bits_per_dimension(model, schedule, image, seed=seed)
    except ArithmeticError:
        bits, error = None, None
    return {"nll": bits, "nll_error": error}


def losses(predict: Model, schedule: NoiseSchedule, sets: dict[str, Tensor], seed: int) -> Results:
    """The denoising loss of sets of images, [N, C, H, W] uint8 each (or folders), by range of timesteps."""
    found = {}
    for name, images in sets.items():
        found[name] = forgetting.denoising_loss(predict, schedule, images, LOSS_IMAGES, buckets=LOSS_BUCKETS, seed=seed)
    return {"losses": found}
