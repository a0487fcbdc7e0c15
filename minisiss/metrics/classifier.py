"""The digit classifier whose probabilities and features the metrics use; see
`minisiss.study.train_classifier`."""

from pathlib import Path

import torch
from torch import Tensor, nn

from minisiss.data.digits import ASSETS
from minisiss.errors import UserError
from minisiss.metrics.quality import Moments

BUNDLED_CLASSIFIER = ASSETS / "digit-classifier.pt"
FORMAT = "minisiss-classifier-1"


class DigitClassifier(nn.Module):
    """p(digit | image): called as `classifier(images: [B, 1, 28, 28] in [−1, 1]) -> logits: [B, 10]`."""

    def __init__(self) -> None:
        super().__init__()

        def block(in_channels: int, out_channels: int, *pool: nn.Module) -> list[nn.Module]:
            convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
            return [convolution, *pool, nn.BatchNorm2d(out_channels), nn.ReLU()]

        halve = nn.MaxPool2d(2)  # 28 → 14 → 7 → 3 pixels
        convolutions = *block(1, 24, halve), *block(24, 48, halve), *block(48, 48), *block(48, 96, halve)
        self.body = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(96 * 3 * 3, 128), nn.ReLU())
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
    """The trained classifier, and the moments of its features of MNIST's 10,000 test digits.

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
        command = "python -m minisiss.study.train_classifier"
        raise UserError(f"{path}: no readable digit classifier; {command} makes one") from error
    return classifier.eval().requires_grad_(False), (mean, covariance)
