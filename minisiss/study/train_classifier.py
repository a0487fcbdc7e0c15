"""Train the digit classifier that the metrics use.

    python -m minisiss.study.train_classifier --data-root data
"""

import time
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.datasets import MNIST
from tqdm import tqdm

from minisiss.data.digits import from_torchvision
from minisiss.data.training_set import to_float
from minisiss.errors import UserError
from minisiss.machine.command_line import Parser, filename, run
from minisiss.metrics.classifier import BUNDLED_CLASSIFIER, FORMAT, DigitClassifier, classify
from minisiss.metrics.quality import Moments, moments
from minisiss.runs.files import write_atomically

LEAST_ACCURACY = 0.993
EPOCHS, BATCH_SIZE, PEAK_LR, SHIFT = 8, 128, 4e-3, 2  # SHIFT: pixels, at most, in either direction


def shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move each image at random by up to `SHIFT` pixels each way; what comes in is background, −1."""
    padded = F.pad(images, (SHIFT, SHIFT, SHIFT, SHIFT), value=-1.0)
    windows = padded.unfold(2, images.shape[2], 1).unfold(3, images.shape[3], 1)  # [B, C, dy, dx, H, W]
    dy, dx = torch.randint(2 * SHIFT + 1, (2, len(images)), generator=generator)
    return windows[torch.arange(len(images)), :, dy, dx]


def train(images: Tensor, labels: Tensor, epochs: int = EPOCHS, seed: int = 0) -> DigitClassifier:
    """Minimise the cross-entropy by AdamW, the learning rate in one cycle up and down (Smith and Topin 2017).

    images: [N, 1, 28, 28] uint8 with N ≥ `BATCH_SIZE`; labels: [N] in 0 … 9. Reproducible from the seed.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    classifier = DigitClassifier().to(memory_format=torch.channels_last)  # on a CPU faster by two thirds
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=PEAK_LR, weight_decay=0.01)
    batches = len(images) // BATCH_SIZE  # the smaller last batch, each epoch another one, is left out
    steps = epochs * batches
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps, pct_start=0.2)
    with tqdm(total=steps, desc="training the classifier", unit="step") as bar:
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=generator)[: batches * BATCH_SIZE]
            for chosen in order.split(BATCH_SIZE):
                loss = F.cross_entropy(classifier(shift(to_float(images[chosen]), generator)), labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rate.step()
                bar.update()
            bar.set_postfix_str(f"loss {loss.item():.4f}")
    return classifier.eval()


def save(path: Path | str, classifier: DigitClassifier, test_moments: Moments, accuracy: float,
         made_by: dict[str, str | int | float]) -> None:
    """Write the weights, the moments of the test digits' features, their worth and origin, atomically."""
    state = {"format": FORMAT, "weights": classifier.state_dict(), "test_moments": test_moments,
             "accuracy": accuracy, "made_by": made_by}
    write_atomically(Path(path), lambda file: torch.save(state, file))


def parse_arguments() -> Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--data-root", type=filename, default="data", help="MNIST, downloaded if missing")
    return parser.parse_args()


def main() -> None:
    root = parse_arguments().data_root
    digits, test = from_torchvision(MNIST, root), from_torchvision(MNIST, root, train=False)
    began = time.perf_counter()
    classifier = train(digits.data[:, None], digits.targets)
    seconds = round(time.perf_counter() - began)
    features, probabilities = classify(classifier, to_float(test.data[:, None]))
    accuracy = (probabilities.argmax(dim=1) == test.targets).double().mean().item()
    print(f"{accuracy:.2%} of the {len(test)} test digits in {seconds} s")
    if accuracy < LEAST_ACCURACY:
        raise UserError(f"that is below {LEAST_ACCURACY:.1%}; {BUNDLED_CLASSIFIER} is left as it was")
    made_by = {
        "command": "python -m minisiss.study.train_classifier", "seconds": seconds,
        "data": f"MNIST, {len(digits)} training digits", "torch": str(torch.__version__),
        "epochs": EPOCHS, "batch_size": BATCH_SIZE, "peak_lr": PEAK_LR, "shift": SHIFT, "seed": 0}
    save(BUNDLED_CLASSIFIER, classifier, moments(features), accuracy, made_by)


if __name__ == "__main__":
    run(main)
