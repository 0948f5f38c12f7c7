"""What only the training script uses; the server never imports it."""
