"""Metrics for colour images by networks that others trained, as TorchScript files: copy similarity and FID.

A TorchScript file holds a program as well as weights, and loading it is running it: only from whom you trust.
"""

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minisiss.data.training_set import to_uint8
from minisiss.errors import UserError

SSCD = "https://dl.fbaipublicfiles.com/sscd-copy-detection/sscd_disc_mixup.torchscript.pt"
INCEPTION = (
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt")


def load_torchscript(path: str, flag: str, source: str, device: torch.device | str) -> torch.jit.ScriptModule:
    """Read a network that carries its own code. Raises UserError, with where to get it, if there is none."""
    if not Path(path).is_file():
        raise UserError(f"{flag} {path}: no such file; get it from {source}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch would rather have torch.export
            return torch.jit.load(path, map_location=device).eval()
    except Exception as error:  # a damaged file can fail anywhere in torch's readers
        raise UserError(f"{flag} {path}: not a TorchScript file; get one from {source}") from error


@torch.inference_mode()
def descriptors(network: torch.jit.ScriptModule, images: Tensor, batch_size: int = 32) -> Tensor:
    """Unit vectors [N, D] that lie close for copies of one picture (SSCD: Pizzi et al. 2022).

    As SSCD was trained: the shorter side resized to 288 pixels, colours normalised by ImageNet's mean and
    deviation. images: [N, 1 or 3, H, W] in [−1, 1].
    """
    mean, std = (images.new_tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    size = [round(288 / min(images.shape[2:]) * side) for side in images.shape[2:]]
    vectors = []
    for batch in images.expand(-1, 3, -1, -1).split(batch_size):
        pixels = F.interpolate((batch + 1) / 2, size=size, mode="bilinear", antialias=True)
        vectors.append(F.normalize(network((pixels - mean) / std), dim=1))
    return torch.cat(vectors)


def copy_similarity(network: torch.jit.ScriptModule, images: Tensor, original: Tensor) -> Tensor:
    """Cosine similarity of the descriptors: [B]. Above about 0.5 it is a copy (Somepalli et al. 2023).

    images: [B, C, H, W] and original: [1 or B, C, H, W], both in [−1, 1].
    """
    return (descriptors(network, images) * descriptors(network, original)).sum(dim=1)


@torch.inference_mode()
def inception_features(network: torch.jit.ScriptModule, images: Tensor, batch_size: int = 32) -> Tensor:
    """Features [N, D] of images [N, 1 or 3, H, W] in [−1, 1], for the FID (Heusel et al. 2017).

    network: called as `network(uint8 images [B, 3, H, W], return_features=True)`, and resizing by itself, as
    the file that Karras et al. (2020) published does. Raises UserError when it cannot be called so.
    """
    try:
        batches = (to_uint8(batch).expand(-1, 3, -1, -1) for batch in images.split(batch_size))
        return torch.cat([network(batch, return_features=True) for batch in batches])
    except RuntimeError as error:
        what = "the network does not take uint8 images and return_features=True"
        raise UserError(f"--inception: {what}; get one that does from {INCEPTION}") from error
