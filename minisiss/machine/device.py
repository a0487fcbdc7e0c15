"""Which device to compute on, and in which precision."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from minisiss.errors import UserError, of_torchrun
from minisiss.schedule import Model


def pick_device(name: str) -> torch.device:
    """"auto" is a GPU where there is one, under torchrun a GPU for each rank. Apple's (mps) is for one alone.

    Raises UserError for a device this machine does not have, and where the ranks would have to share one.
    """
    alone = of_torchrun("WORLD_SIZE", 1) == 1
    if name == "auto":
        mps = alone and torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name.startswith("mps") and not alone:
        raise UserError(f"--device {name}: ranks cannot communicate from there; use --device auto or cpu")
    if name.startswith("cuda") and (ranks := of_torchrun("LOCAL_WORLD_SIZE", 1)) > 1:
        if name != "cuda" or ranks > torch.cuda.device_count():
            most = f"no more ranks than GPUs ({torch.cuda.device_count()})"
            raise UserError(f"--device {name}: {ranks} ranks take a GPU each; use --device auto, and {most}")
        name = f"cuda:{of_torchrun('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name}: not usable on this machine; use --device auto or cpu") from error
    if device.type == "meta":
        raise UserError(f"--device {name}: holds no numbers; use --device auto or cpu")
    return device


def adamw(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW on the model's device, in one kernel where every torch has one; elsewhere torch chooses."""
    parameters = list(model.parameters())
    fused = True if parameters[0].device.type in ("cpu", "cuda") else None
    return torch.optim.AdamW(parameters, lr=lr, fused=fused)


def chosen_precision(device: torch.device, precision: str) -> str:
    """"auto" is bf16 where the processor computes it natively; elsewhere it is slower than float32."""
    if precision == "auto" and device.type == "cuda":
        precision = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    elif precision == "auto" and device.type == "cpu":
        checks = "_is_avx512_bf16_supported", "_is_amx_tile_supported"  # private: not in every torch
        precision = "bf16" if any(getattr(torch.cpu, check, bool)() for check in checks) else "fp32"
    return "fp32" if precision == "auto" else precision  # not every torch has bf16 on other devices


def at_precision(model: nn.Module, device: torch.device, precision: str, compiled: bool = False) -> Model:
    """The network as a function that computes in bfloat16 or float32; weights and output are float32.

    compiled: by torch.compile, when first called; the function raises UserError where that fails.
    Raises UserError for bf16 on a device where this torch has no autocast.
    """
    bf16 = chosen_precision(device, precision) == "bf16"
    if bf16 and not torch.amp.is_autocast_available(device.type):
        raise UserError(f"--precision bf16: not on {device.type} in torch {torch.__version__}; use fp32")
    if compiled:
        model = torch.compile(model)

    def predict(x: Tensor, timesteps: Tensor, prompt: Tensor | None = None) -> Tensor:
        given = () if prompt is None else (prompt,)  # any function of (x, timesteps) will do as a model
        with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
            return model(x, timesteps, *given).float()

    def predict_compiled(x: Tensor, timesteps: Tensor, prompt: Tensor | None = None) -> Tensor:
        for tensor in (x, timesteps):  # SISS's passes have another size each step: compile for all
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        try:
            return predict(x, timesteps, prompt)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"--compile: torch.compile failed: {reason}") from error

    return predict_compiled if compiled else predict
