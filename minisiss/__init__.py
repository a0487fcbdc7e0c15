"""minisiss: SISS, data unlearning in diffusion models (Alberti et al. 2025), in plain PyTorch."""
