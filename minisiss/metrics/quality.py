"""How good samples are as a set, from what a classifier says about them: plain functions on tensors."""

import torch
from torch import Tensor

SPLITS = 10  # of an inception score
Moments = tuple[Tensor, Tensor]  # the mean [D] and the covariance [D, D] of features, float64 on the CPU


def inception_score(probabilities: Tensor, splits: int = SPLITS) -> tuple[float, float]:
    """exp E_x KL(p(y|x) ‖ p(y)): mean and deviation over splits (Salimans et al. 2016, section 4).

    From 1, when every image gets the same distribution, to the number of classes, when each image is surely
    of one class and the classes are equally frequent. p(y) is the mean over the split.

    probabilities: [N, classes], p(y|x) of each sample, rows adding up to 1; consecutive rows make up a split,
    as equal in size as can be. Raises ValueError when N < splits.
    """
    if not 1 <= splits <= len(probabilities):
        raise ValueError(f"an inception score over {splits} splits needs images, got {len(probabilities)}")
    scores = []
    for p in probabilities.cpu().double().tensor_split(splits):
        marginal = p.mean(dim=0)  # p(y)
        divergence = (torch.xlogy(p, p) - torch.xlogy(p, marginal)).sum(dim=1)  # KL; xlogy: 0 log 0 = 0
        scores.append(divergence.mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def moments(features: Tensor) -> Moments:
    """Mean and covariance (divisor N − 1) of features: [N, D]. Raises ValueError unless N ≥ 2."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"a covariance needs features [N, D] with N ≥ 2, got {list(features.shape)}")
    features = features.cpu().double()  # not every device has float64
    return features.mean(dim=0), torch.atleast_2d(torch.cov(features.T))


def frechet_distance(a: Moments, b: Moments) -> float:
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½) between two sets of features (Heusel et al. 2017, eq. 6).

    The squared 2-Wasserstein distance of the Gaussians with these moments. Σ_a Σ_b has the eigenvalues of the
    symmetric Σ_a^½ Σ_b Σ_a^½, and the trace of its root is the sum of theirs. In float64.
    Raises ValueError when the two have different numbers of features.
    """
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    if mean_a.shape != mean_b.shape:
        raise ValueError(f"a Fréchet distance needs the same features, got {len(mean_a)} and {len(mean_b)}")
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T  # Σ_a^½
    # Rounding turns eigenvalues of 0 into small negative ones.
    trace_root = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace_root).item()


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E‖a − b‖ − E‖a − a'‖ − E‖b − b'‖ between two sets of points (Székely and Rizzo 2013), without bias.

    a: [N, D]; b: [M, D]. Two sets of the same origin have 0 in the mean, a little more or less in each case.
    Raises ValueError where a set has fewer than 2 points.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"an energy distance needs two points of each set, got {len(a)} and {len(b)}")
    within = [torch.cdist(s, s).sum() / (len(s) * (len(s) - 1)) for s in (a, b)]
    return (2 * torch.cdist(a, b).mean() - sum(within)).item()
