"""What the scripts need around the method: data, runs, files, metrics."""
