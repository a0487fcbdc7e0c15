"""The device, its precision, and one run on several: `torchrun --nproc-per-node N unlearn.py …`.
Every process, or rank, makes the same random draws and computes its share of a batch;
`unlearning.step` adds the gradients up. Rank 0 alone speaks and writes files."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minisiss.lab.cli import UserError, rank  # noqa: F401 (machine.rank)
from minisiss.schedule import Model


def start(name: str) -> torch.device:
    """The device called `name`; "auto" is a GPU where there is one, and a GPU per rank. Under
    torchrun this joins the other ranks. Raises UserError for a device that cannot be used."""
    launched = dist.is_available() and dist.is_torchelastic_launched()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if launched and name.startswith("cuda"):
            name = f"cuda:{os.environ['LOCAL_RANK']}"
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name}: cannot be used on this machine ({error})") from error
    if launched:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        # Longer than rank 0 takes for a download.
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    return device


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value: Any) -> list[Any]:
    """The values that the ranks have. Each rank waits for all others here."""
    values = [value] * size()
    if size() > 1:
        dist.all_gather_object(values, value)
    return values


def leave() -> None:
    """Part from the other ranks at the end of a run that went well."""
    if dist.is_initialized():
        dist.destroy_process_group()


def has_bf16(device: torch.device) -> bool:
    """Whether the processor computes bfloat16 natively; elsewhere it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # A private name, which the oldest torch that will do lacks.
    return device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()


def at_precision(device: torch.device, precision: str,
                 compiled: bool = False) -> Callable[[nn.Module], Model]:
    """A function that makes networks compute in bfloat16 or float32; what they give is float32."""
    bf16 = precision == "bf16" or (precision == "auto" and has_bf16(device))

    def at(model: nn.Module) -> Model:
        network = torch.compile(model) if compiled else model

        def predict(x: Tensor, timesteps: Tensor, prompt: Tensor | None = None) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                return network(x, timesteps, prompt).float()

        return predict

    return at
