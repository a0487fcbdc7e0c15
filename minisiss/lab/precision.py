"""In which numbers the network computes: bfloat16 where that is quick, else float32."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from minisiss.schedule import Model


def has_bf16(device: torch.device) -> bool:
    """Whether the processor computes bfloat16 natively; elsewhere it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # A private name, which the oldest torch that will do lacks.
    return device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()


def adamw(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW on all parameters of a model, in one kernel where torch has one."""
    parameters = list(model.parameters())
    fused = parameters[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(parameters, lr=lr, fused=fused)


def at_precision(model: nn.Module, device: torch.device, precision: str,
                 compiled: bool = False) -> Model:
    """The network as a function that computes in bfloat16 or float32; weights stay float32.

    Called as `predict(x, timesteps, prompt=None)`. Returns float32.
    """
    bf16 = precision == "bf16" or (precision == "auto" and has_bf16(device))
    if compiled:
        model = torch.compile(model)

    def predict(x: Tensor, timesteps: Tensor, prompt: Tensor | None = None) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
            return model(x, timesteps, prompt).float()

    return predict
