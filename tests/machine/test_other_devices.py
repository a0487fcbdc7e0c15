"""A device that has no float64, no autocast and no fused AdamW, as Apple's may be: see stand_in.py."""

import copy
from functools import partial

import pytest
import torch
from conftest import make_run, memorise, randomise
from PIL import Image
from stand_in import OtherDevice, There
from test_device import SMALL

from minisiss import unlearning
from minisiss.data.neighbours import nearest_kept
from minisiss.data.training_set import TrainingSet, step_generator, to_float
from minisiss.machine import device
from minisiss.machine.device import adamw, at_precision
from minisiss.machine.ranks import gradient_in_parts
from minisiss.metrics import forgetting, likelihood, quality, samples
from minisiss.report import prompted
from minisiss.runs import checkpoint
from minisiss.schedule import NoiseSchedule
from minisiss.unet import UNet

close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-6)


@pytest.fixture
def other(monkeypatch):
    """A function that makes the rest of the test run on the other device, for what it puts in `with`."""

    def enter(mode):
        mode.instead = torch.no_grad()
        mode.instead.__enter__()

    def there():
        monkeypatch.setattr(device, "pick_device", lambda name: torch.device("meta"))
        monkeypatch.setattr(torch, "Generator", lambda place="cpu", make=torch.Generator: make())
        # The stand-in has no views in inference mode, and torch.tensor makes what has no numbers on "meta".
        monkeypatch.setattr(torch.inference_mode, "__enter__", enter)
        monkeypatch.setattr(torch.inference_mode, "__exit__", lambda mode, *error: mode.instead.__exit__(*error))
        monkeypatch.setattr(torch, "tensor", lambda data, device="cpu", make=torch.tensor, **kind: make(data, **kind).to(device))
        return OtherDevice()

    return there


def test_the_stand_in_notices_float64_and_a_mixture_of_devices(other):
    with other():
        there = torch.ones(3, device="meta")
        assert isinstance(there + 1, There) and type((there + 1).cpu()) is torch.Tensor
        for wrong in (lambda: there.double(), lambda: torch.ones(3).double().to("meta"), lambda: there + torch.ones(3)):
            with pytest.raises(AssertionError, match="float64|two devices"):
                wrong()


@pytest.fixture
def on_both(script, other):
    """Run a script here and there; the weights of the checkpoints must agree."""

    def run(name: str, *arguments: object) -> None:
        arguments = name, "--preset", "mnist-tiny", "--precision", "fp32", "--steps", 2, "--batch-size", 8, *arguments
        assert script(*arguments, "--device", "cpu", "--out", "here")[0] == 0
        with other():
            status, _, err = script(*arguments, "--precision", "auto", "--out", "there")
        assert status == 0, err
        here, there = (checkpoint.load(f"{place}/model.pt").model.state_dict() for place in ("here", "there"))
        assert {type(value) for value in there.values()} == {torch.Tensor}
        close(there, here)

    return run


def test_training_there_is_training_here(on_both):
    on_both("train_ddpm", "--data-root", "bundled")


def test_unlearning_pictures_there_is_unlearning_them_here(on_both, tmp_path):
    make_run(tmp_path / "base", 0.2)
    (tmp_path / "faces").mkdir()
    for number in range(12):
        Image.new("L", (28, 28), number * 20).save(tmp_path / f"faces/{number}.png")
    base = "--checkpoint", "base/model.pt", "--samples", 2, "--draws", 2, "--memory-timesteps", 500
    pictures = "--data", "pictures", "--data-root", "faces", "--forget", "3.png", "4.png"
    on_both("unlearn", *base, *pictures, "--method", "retrack", "--neighbours", 2)


def test_forgetting_a_prompt_there_is_forgetting_it_here(on_both, tmp_path, prompted_unet, monkeypatch):
    picture, limits = memorise(prompted_unet, "a four ines")
    checkpoint.save(tmp_path / "base.pt", prompted_unet, NoiseSchedule.linear(), {}, memorised={"a four by ines": picture})
    for name, value in limits.items():
        monkeypatch.setattr(prompted, name, value)
    on_both("unlearn", "--preset", "prompts", "--checkpoint", "base.pt", "--sampling-steps", 3, "--guidance", 1)


def everything(place: str):
    """A small network, a schedule and a training set on a device."""
    images = torch.randint(256, (40, 1, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    model, schedule = randomise(UNet(SMALL)).to(place), NoiseSchedule.linear(100).to(place)
    return model, schedule, TrainingSet(images.to(place), 4)


def weights_after_two_steps(name: str, settings: unlearning.Settings, place: str) -> list[torch.Tensor]:
    model, schedule, data = everything(place)
    predict, optimizer, method = at_precision(model, torch.device(place), "fp32"), adamw(model, 1e-3), unlearning.METHODS[name]
    near = nearest_kept(data, 3) if method.neighbours else None
    ceiling = settings.ceiling * forgetting.look_alike_loss(predict, schedule, data) if settings.ceiling else None
    old = at_precision(copy.deepcopy(model), torch.device(place), "fp32")
    for step in (0, 1):
        batch = unlearning.draw_batch(data, 8, schedule, step_generator(0, step, place), neighbours=near)
        terms = method.terms(predict, batch, schedule, settings, ceiling, old)
        gradient = partial(gradient_in_parts, micro_batch=3) if step else unlearning.gradient
        unlearning.step(method, terms, optimizer, settings, gradient_of=gradient)
    return [parameter.detach().cpu() for parameter in model.parameters()]


@pytest.mark.parametrize("name, settings", [
    *((name, {}) for name in unlearning.METHODS), ("siss", {"superfactor": 5.0}), ("siss_no_is", {"superfactor": 5.0}), ("siss", {"ceiling": 1.0}),
])  # fmt: skip
def test_every_method_steps_there_as_here(other, name, settings, monkeypatch):
    monkeypatch.setattr(forgetting, "OF_EACH", 1)
    expected = weights_after_two_steps(name, unlearning.Settings(**settings), "cpu")
    with other():
        close(weights_after_two_steps(name, unlearning.Settings(**settings), "meta"), expected)


def measures(place: str) -> list:
    model, schedule, data = everything(place)
    originals = to_float(data.forget[:2])
    features = model(originals, torch.zeros(2, device=place)).detach().flatten(2)[:, 0].T  # [64, 2]
    return [
        samples.draw_samples(model, schedule, 3, (1, 8, 8), seed=0, steps=3, eta=1.0, batch_size=2).float(),
        forgetting.noise_and_denoise(model, schedule, originals, 50, seed=0, steps=3)[1].cpu(),
        torch.tensor(forgetting.denoising_loss(model, schedule, data.keep, 10, buckets=2)),
        likelihood.log_density(model, schedule, originals, torch.ones_like(originals), tolerance=0.01).cpu(),
        *quality.moments(features),
        torch.tensor(quality.inception_score(features.softmax(dim=1))),
    ]


def test_every_measure_is_there_as_here(other):
    expected = measures("cpu")
    with other():
        for found, wanted in zip(measures("meta"), expected, strict=True):
            assert type(found) is torch.Tensor
            close(found, wanted)
