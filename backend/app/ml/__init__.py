"""What training and serving must agree on; imports neither of them."""
