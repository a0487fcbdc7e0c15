"""What a run leaves: its directory, its checkpoints, published weights; and reading files from strangers."""
