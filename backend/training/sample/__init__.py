"""Drawn plates: a small set of synthetic pictures to try the whole job with, no download."""
