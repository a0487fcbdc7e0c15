"""What models are trained on: the digits and the T-shirt, folders of pictures."""
