"""The experiments behind the figures: all runs, the benchmark, the training of the classifier."""
