"""minisiss: data unlearning in diffusion models by SISS (Alberti et al., ICLR 2025), in plain PyTorch."""
