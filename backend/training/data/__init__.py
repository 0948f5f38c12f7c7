"""From a photo to a batch of pixels: which images, which label, which split."""
