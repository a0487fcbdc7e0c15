"""The digit classifier whose probabilities and features the metrics use, and the command that trained it.

    python -m minisiss.classifier --data-root data
"""

import time
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torchvision.datasets import MNIST
from tqdm import tqdm

from minisiss.cli import Parser, UserError, filename, run
from minisiss.data import ASSETS, from_torchvision, to_float
from minisiss.files import write_atomically
from minisiss.quality import Moments, moments

BUNDLED_CLASSIFIER = ASSETS / "digit-classifier.pt"
FORMAT = "minisiss-classifier-1"
LEAST_ACCURACY = 0.993
EPOCHS, BATCH_SIZE, PEAK_LR, SHIFT = 8, 128, 4e-3, 2  # SHIFT: pixels, at most, in either direction


class DigitClassifier(nn.Module):
    """p(digit | image): called as `classifier(images: [B, 1, 28, 28] in [−1, 1]) -> logits: [B, 10]`."""

    def __init__(self) -> None:
        super().__init__()

        def block(in_channels: int, out_channels: int, *pool: nn.Module) -> list[nn.Module]:
            convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
            return [convolution, *pool, nn.BatchNorm2d(out_channels), nn.ReLU()]

        halve = nn.MaxPool2d(2)  # 28 → 14 → 7 → 3 pixels
        self.body = nn.Sequential(
            *block(1, 24, halve), *block(24, 48, halve), *block(48, 48), *block(48, 96, halve),
            nn.Flatten(), nn.Linear(96 * 3 * 3, 128), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(128, 10)

    def features(self, images: Tensor) -> Tensor:
        """What the classifier decides from, [B, 128]: its last hidden layer."""
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


@torch.inference_mode()
def classify(classifier: DigitClassifier, images: Tensor, batch_size: int = 500) -> tuple[Tensor, Tensor]:
    """Features [N, 128] and class probabilities [N, 10] of images: [N, 1, 28, 28] in [−1, 1], in batches."""
    features = torch.cat([classifier.features(batch) for batch in images.split(batch_size)])
    return features, classifier.head(features).softmax(dim=1)


def load_classifier(path: Path | str = BUNDLED_CLASSIFIER) -> tuple[DigitClassifier, Moments]:
    """The trained classifier, ready to classify, and the moments of its features of MNIST's 10,000 test digits.

    Raises UserError, naming the file, when it is not one of ours.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != FORMAT:
            raise ValueError(f"its format is not '{FORMAT}'")
        classifier = DigitClassifier()
        classifier.load_state_dict(state["weights"])
        mean, covariance = state["test_moments"]
        if covariance.shape != (len(mean), len(mean)) or len(mean) != classifier.head.in_features:
            raise ValueError("the moments are not those of its features")
    except Exception as error:  # a damaged file can fail anywhere in torch's readers
        raise UserError(f"{path}: no readable digit classifier; python -m minisiss.classifier makes one") from error
    return classifier.eval().requires_grad_(False), (mean, covariance)


def shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move each image by up to `SHIFT` pixels in either direction, at random; what comes in is background, −1."""
    padded = F.pad(images, (SHIFT, SHIFT, SHIFT, SHIFT), value=-1.0)
    windows = padded.unfold(2, images.shape[2], 1).unfold(3, images.shape[3], 1)  # [B, C, 2·SHIFT+1, 2·SHIFT+1, H, W]
    dy, dx = torch.randint(2 * SHIFT + 1, (2, len(images)), generator=generator)
    return windows[torch.arange(len(images)), :, dy, dx]


def train(images: Tensor, labels: Tensor, epochs: int = EPOCHS, seed: int = 0) -> DigitClassifier:
    """Minimise the cross-entropy by AdamW, the learning rate up and down again in one cycle (Smith and Topin 2017).

    images: [N, 1, 28, 28] uint8 with N ≥ `BATCH_SIZE`, and labels: [N] in 0 … 9. Reproducible from the seed.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    classifier = DigitClassifier().to(memory_format=torch.channels_last)  # on a CPU faster by two thirds
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=PEAK_LR, weight_decay=0.01)
    batches = len(images) // BATCH_SIZE  # a last, smaller batch is left out: each epoch another one
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=epochs * batches, pct_start=0.2)
    with tqdm(total=epochs * batches, desc="training the classifier", unit="step") as bar:
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=generator)[: batches * BATCH_SIZE]
            for chosen in rearrange(order, "(batches b) -> batches b", b=BATCH_SIZE):
                loss = F.cross_entropy(classifier(shift(to_float(images[chosen]), generator)), labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rate.step()
                bar.update()
            bar.set_postfix_str(f"loss {loss.item():.4f}")
    return classifier.eval()


def save(
    path: Path | str, classifier: DigitClassifier, test_moments: Moments, accuracy: float, made_by: dict[str, str | int | float]
) -> None:
    """Write the weights, the moments of the test digits' features, what they are worth and what made them, atomically."""
    state = {
        "format": FORMAT, "weights": classifier.state_dict(), "test_moments": test_moments, "accuracy": accuracy, "made_by": made_by,
    }  # fmt: skip
    write_atomically(Path(path), lambda file: torch.save(state, file))


def parse_arguments() -> Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--data-root", type=filename, default="data", help="MNIST in torchvision's layout, downloaded if missing")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    digits, test = from_torchvision(MNIST, args.data_root), MNIST(args.data_root, train=False)

    began = time.perf_counter()
    classifier = train(digits.data[:, None], digits.targets)
    seconds = round(time.perf_counter() - began)
    features, probabilities = classify(classifier, to_float(test.data[:, None]))
    accuracy = (probabilities.argmax(dim=1) == test.targets).double().mean().item()
    print(f"{accuracy:.2%} of the {len(test)} test digits in {seconds} s")
    if accuracy < LEAST_ACCURACY:
        raise UserError(f"that is below {LEAST_ACCURACY:.1%}; {BUNDLED_CLASSIFIER} is left as it was")

    made_by = {
        "command": "python -m minisiss.classifier", "data": f"MNIST, {len(digits)} training digits", "seconds": seconds,
        "epochs": EPOCHS, "batch_size": BATCH_SIZE, "peak_lr": PEAK_LR, "shift": SHIFT, "seed": 0, "torch": str(torch.__version__),
    }  # fmt: skip
    save(BUNDLED_CLASSIFIER, classifier, moments(features), accuracy, made_by)
    return 0


if __name__ == "__main__":
    run(main)
