"""In which numbers the network computes."""

import torch

from minisiss.lab.machine import at_precision


def test_bf16_computes_in_bfloat16_and_returns_float32(tiny_unet):
    x = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    inputs = x, torch.tensor([0, 300, 600, 999])
    exact = at_precision(torch.device("cpu"), "fp32")(tiny_unet)(*inputs)
    rounded = at_precision(torch.device("cpu"), "bf16")(tiny_unet)(*inputs)
    assert torch.equal(exact, tiny_unet(*inputs)) and rounded.dtype == torch.float32
    error = (rounded - exact).norm() / exact.norm()
    assert 1e-4 < error < 5e-2  # bfloat16 has 8 bits
