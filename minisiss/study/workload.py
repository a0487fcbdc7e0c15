"""What `bench` measures: a network with pictures to step it on, and SISS as the paper's code steps it."""

import copy
from argparse import Namespace
from functools import partial

import torch
import torch.nn.functional as F
from torchvision.transforms.functional import resize

from minisiss import unlearning
from minisiss.data.digits import BUNDLED
from minisiss.data.folder import ImageFolder
from minisiss.data.neighbours import nearest_kept
from minisiss.data.training_set import TrainingSet, mnist_with_tshirt, step_generator
from minisiss.losses import Terms, squared_error
from minisiss.machine.device import adamw, at_precision, pick_device
from minisiss.machine.ranks import ALONE, World, gradient_in_parts
from minisiss.presets import PRESETS
from minisiss.sampling import sample
from minisiss.schedule import NoiseSchedule
from minisiss.unet import UNet, UNetConfig
from minisiss.unlearning import METHODS, Gradient, Settings

SLIM = dict(channels=(16, 16, 32, 32, 64, 64), norm_groups=16)  # of celebahq's depth, for a CPU
# On a CPU, and on a GPU.
BATCH_SIZES = {"mnist-tiny": (8, 8), "mnist-small": (64, 64), "mnist": (16, 128), "celebahq": (8, 16)}
NAIVE, LITERAL, KNOWN = "naive_deletion", "siss literal", "siss, c known"
DEFAULTS = Settings()
STEPS = [NAIVE, LITERAL, "siss", KNOWN, "siss_no_is", "erasediff", "neggrad", "retrack", "unseen"]


class Workload:
    """One network with its pictures and optimizer, ready to step.

    The learning rate is 0: a step is as much work as any, and leaves the network as it was.
    """

    def __init__(self, args: Namespace, preset: str, world: World = ALONE) -> None:
        self.device, self.seed, self.world = pick_device(args.device), args.seed, world
        on_gpu = self.device.type != "cpu"
        slim = SLIM if preset == "celebahq" and not on_gpu else {}
        self.config = UNetConfig(**PRESETS[preset]["unet"] | slim)
        self.batch_size = args.batch_size or BATCH_SIZES[preset][on_gpu]
        images, k = pictures(self.config, args.data_root)
        self.data = TrainingSet(images.to(self.device), k, world=world)
        self.near = nearest_kept(self.data, DEFAULTS.neighbours)
        self.schedule = NoiseSchedule.linear().to(self.device)
        torch.manual_seed(args.seed)
        self.model = UNet(self.config).to(self.device)
        self.predict = at_precision(self.model, self.device, args.precision)
        self.optimizer = adamw(self.model, lr=0.0)

    def at(self, precision: str, compiled: bool = False) -> "Workload":
        """The same network, computed in another way."""
        other = copy.copy(self)
        other.predict = at_precision(self.model, self.device, precision, compiled)
        return other

    def terms(self, name: str, round: int, settings: Settings = DEFAULTS) -> Terms:
        """What a method makes of the round's batch: timesteps and noise are the same for all methods."""
        method, generator = METHODS[name], step_generator(self.seed, round, self.device)
        size = self.batch_size * self.world.size
        near = self.near if method.neighbours else None
        batch = unlearning.draw_batch(self.data, size, self.schedule, generator, neighbours=near)
        return method.terms(self.predict, batch, self.schedule, settings, old=self.predict)

    def step(self, name: str, round: int) -> None:
        """All of a step, as in unlearn.py: draw a batch, run the network, combine gradients, run AdamW."""
        method = "siss" if name in (LITERAL, KNOWN) else name
        settings = Settings(superfactor=9.0) if name == KNOWN else DEFAULTS
        terms = self.terms(method, round, settings)
        if name == LITERAL:
            literal_step(terms, self.optimizer, settings)
        else:
            gradient = partial(gradient_in_parts, world=self.world)
            unlearning.step(METHODS[method], terms, self.optimizer, settings, gradient_of=gradient)

    def sample(self, calls: int, round: int) -> None:
        """The first `calls` steps of sampling a batch on every rank."""
        generator = step_generator(self.seed, round, self.device)
        shape = (self.batch_size, *self.config.image_shape)
        images = sample(self.predict, self.schedule, shape, steps=calls, eta=0.0, generator=generator)
        self.world.gather(images)


def literal_gradients(terms: Terms, parameters: Gradient) -> tuple[Gradient, Gradient]:
    """g_keep and g_forget as in the paper's code: one forward pass, two backward passes over its graph."""
    prediction = terms.keep.model(terms.keep.noisy, terms.keep.timesteps)
    keep, forget = (
        (term.weight * squared_error(prediction, term.target)).mean() for term in (terms.keep, terms.forget))
    return torch.autograd.grad(keep, parameters, retain_graph=True), torch.autograd.grad(forget, parameters)


def literal_step(terms: Terms, optimizer: torch.optim.Optimizer, settings: Settings) -> None:
    """A step of SISS by `literal_gradients`."""
    parameters = unlearning.parameters_of(optimizer)
    g_keep, g_forget = literal_gradients(terms, parameters)
    c = unlearning.subtract(g_keep, g_forget, settings)
    for parameter, k, f in zip(parameters, g_keep, g_forget, strict=True):
        parameter.grad = k - c * f
    unlearning.descend(optimizer, {})


def pictures(config: UNetConfig, root: str | None) -> tuple[torch.Tensor | ImageFolder, int]:
    """Pictures of realistic contrast, which decides how many images count in both terms of SISS; and |A|.

    In grey the bundled digits and T-shirt; in colour those in the folder `root`, or smooth random ones.
    """
    size = (config.image_size, config.image_size)
    if config.image_channels == 1:
        data = mnist_with_tshirt(BUNDLED)
        return resize(data.images, size, antialias=True), data.k
    if root is not None:
        folder = ImageFolder(root, config.image_shape)[:128]
        return folder.with_last(folder.names[-1:]), 1
    generator = torch.Generator().manual_seed(0)
    coarse, fine = (torch.rand(128, 3, n, n, generator=generator) * 2 - 1 for n in (7, config.image_size))
    images = F.interpolate(coarse, size, mode="bilinear") + 0.1 * fine
    return (images.clamp(-1, 1) * 127.5 + 127.5).byte(), 1
