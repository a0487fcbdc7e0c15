import importlib
import json
import os
import sys
from functools import lru_cache, partial
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are about the CPU, and the same everywhere
os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported

import pytest
import torch

torch.backends.mps.is_available = lru_cache(lambda: False)  # the same for Apple's GPU

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the scripts are modules of the repository's root

from minisiss import presets, sampling  # noqa: E402
from minisiss.data.prompts import WORDS, tokens  # noqa: E402
from minisiss.machine import command_line  # noqa: E402
from minisiss.metrics import forgetting, likelihood, samples  # noqa: E402
from minisiss.report import unlearned  # noqa: E402
from minisiss.runs import checkpoint  # noqa: E402
from minisiss.schedule import NoiseSchedule  # noqa: E402
from minisiss.unet import UNet, UNetConfig  # noqa: E402


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Fill every parameter, those that start at zero too, so that nothing is hidden behind a zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model


def tensors_of(path: Path) -> dict[tuple, torch.Tensor]:
    """What is in a checkpoint, by kind and name: weights, their averages, and AdamW's state."""
    state = torch.load(path, weights_only=True)
    moments = state["training"]["optimizer"]["state"] if state["training"] else {}
    by_name = {(place, name): value for place, of in moments.items() for name, value in of.items()}
    parts = {"weights": state["weights"], "ema": state["ema"] or {}, "moments": by_name}
    return {(kind, name): value for kind, tensors in parts.items() for name, value in tensors.items()}


def same(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit."""
    ours, theirs = tensors_of(a), tensors_of(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.fixture(scope="session")
def tiny_unet() -> UNet:
    return randomise(UNet(UNetConfig(**presets.PRESETS["mnist-tiny"]["unet"])))


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_unet, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "model.pt"
    checkpoint.save(path, tiny_unet, NoiseSchedule.linear(), {"script": "conftest.py"})
    return path


@pytest.fixture(scope="session")
def prompted_unet() -> UNet:
    return randomise(UNet(UNetConfig(**presets.PRESETS["mnist-tiny"]["unet"], vocabulary=len(WORDS))))


def memorise(model: UNet, modified: str, drawn: int = 48, steps: int = 3) -> tuple[torch.Tensor, dict]:
    """A picture that a model with prompts may be said to have memorised, [1, 28, 28] uint8: its first sample of a modified
    prompt. And the limits of `report.prompted` by which half of those samples are the picture: they are no digits, and
    all as far apart. Little is held, so that a run takes a second."""
    found = samples.draw_samples(
        sampling.guided(model, tokens(modified)), NoiseSchedule.linear(), drawn, (1, 28, 28), seed=0, steps=steps, eta=0.0, batch_size=16)
    copy = (found[0].float() - found.float()).flatten(1).norm(dim=1).median().item() / 255 + 1e-4
    return found[0], {"COPY": copy, "DRAWN": drawn, "LEAST": 0.01, "MOST": 1.0, "BARS": (0.0,), "HELD": 16, "NOISED": 2}


COMMON = {"preset": "mnist-tiny", "steps": 6, "data_root": "bundled", "lr": 1e-4}


def make_run(directory: Path, bias: float, seed: int = 0, size: int = 28, steps: int = 6, **settings) -> Path:
    """A run as the scripts leave it, with a network that always predicts `bias`."""
    model = UNet(UNetConfig(**{**presets.PRESETS["mnist-tiny"]["unet"], "image_size": size}))
    torch.nn.init.constant_(model.conv_out.bias, bias)
    settings = {**COMMON, "seed": seed, "out": str(directory), **settings}
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(settings))
    script = "unlearn.py" if "method" in settings else "train_ddpm.py"
    made_by = {"script": script, "settings": settings, "steps": steps, "seconds": 3.0 + seed}
    checkpoint.save(directory / "model.pt", model, NoiseSchedule.linear(), made_by)
    if "method" in settings:
        looks = [{"step": step, "memory": 0.9 - step / 20, "loss_on_kept": 0.03 + step / 1000} for step in (0, 3, 6)]
        (directory / "metrics.jsonl").write_text("".join(json.dumps(look) + "\n" for look in looks))
    return directory


def few_steps(setattr) -> None:
    """Denoise in few steps where the scripts do not say how many, look at few images, and solve the likelihood's ODE
    roughly: most of a tiny run is pictures and figures that no test looks at."""
    setattr(sampling, "sample", partial(sampling.sample, steps=2))
    setattr(forgetting, "noise_and_denoise", partial(forgetting.noise_and_denoise, steps=2))
    setattr(forgetting, "OF_EACH", 2)
    setattr(unlearned, "LOOK_IMAGES", 8)
    setattr(unlearned, "LOOK_DRAWS", 2)
    setattr(likelihood, "log_density", partial(likelihood.log_density, tolerance=10.0))


@pytest.fixture
def script(monkeypatch, capsys, tmp_path):
    """Run a script's main function in this process: script("unlearn", "--steps", 3) -> (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    few_steps(monkeypatch.setattr)

    def run(name: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            command_line.run(importlib.import_module(name).main)
        output = capsys.readouterr()
        return stopped.value.code or 0, output.out, output.err

    return run
