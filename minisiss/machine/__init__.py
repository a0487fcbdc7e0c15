"""What a run runs on: the command line, device and precision, several ranks."""
