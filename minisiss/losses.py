"""The losses, as pure functions: nothing here knows of files, devices or command lines."""

from torch import Tensor

from minisiss.sampling import Model
from minisiss.schedule import NoiseSchedule


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """‖target − prediction‖² of each image, as the mean over its pixels so that image sizes compare: [B]."""
    return (target - prediction.float()).pow(2).flatten(1).mean(dim=1)


def epsilon_matching(model: Model, x: Tensor, timesteps: Tensor, noise: Tensor, schedule: NoiseSchedule) -> Tensor:
    """‖noise − ε_θ(m_t, t)‖² with m_t = γ_t x + σ_t noise, per image: [B] (Ho et al. 2020, eq. 14)."""
    return squared_error(model(schedule.add_noise(x, noise, timesteps), timesteps), noise)
