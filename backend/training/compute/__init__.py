"""From pixels to features, and what the arithmetic runs on."""
