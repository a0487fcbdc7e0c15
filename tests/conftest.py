"""What the tests share: small networks, checkpoints, and the scripts as functions."""

import importlib
import json
import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are about the CPU, and the same everywhere
os.environ["TQDM_DISABLE"] = "1"  # tqdm reads it when it is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the threads of several processes slow each other

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the scripts are modules of the repository's root

from minisiss.lab import checkpoint, cli  # noqa: E402
from minisiss.lab.presets import PRESETS  # noqa: E402
from minisiss.schedule import NoiseSchedule  # noqa: E402
from minisiss.unet import UNet, UNetConfig  # noqa: E402

TINY = PRESETS["mnist-tiny"]["unet"]


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Fill every parameter, those that start at zero too, so that nothing hides behind a zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model


def tensors_of(path: Path) -> dict[tuple, torch.Tensor]:
    """The tensors in a checkpoint: averaged weights, weights, and AdamW's state."""
    state = torch.load(path, weights_only=True)
    training = state["training"]
    found = {("average", name): value for name, value in state["weights"].items()}
    found |= {("weights", name): value for name, value in training.get("weights", {}).items()}
    for place, moments in training.get("optimizer", {}).get("state", {}).items():
        found |= {(place, name): value for name, value in moments.items()}
    return found


def same(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit."""
    ours, theirs = tensors_of(a), tensors_of(b)
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], value) for name, value in theirs.items()
    )


def log_of(run: Path) -> list[dict[str, float]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def tiny_unet() -> UNet:
    return randomise(UNet(UNetConfig(**TINY)))


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_unet, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "model.pt"
    made_by = {"script": "conftest.py"}
    checkpoint.save(path, checkpoint.Checkpoint(tiny_unet, NoiseSchedule.linear(), made_by))
    return path


@pytest.fixture
def script(monkeypatch, capsys, tmp_path):
    """Run a script in this process: script("unlearn", "--steps", 3) -> (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.run(importlib.import_module(name).main)
        output = capsys.readouterr()
        return stopped.value.code or 0, output.out, output.err

    return run
