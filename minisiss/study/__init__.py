"""The experiments behind the figures: the toy picture, the benchmark, and the study."""
