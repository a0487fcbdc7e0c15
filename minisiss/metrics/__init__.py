"""What is measured: how much is remembered, how good samples are, how likely a picture is."""
