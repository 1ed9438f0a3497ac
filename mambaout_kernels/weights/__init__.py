"""Weights: files of the authors and of timm, read and written, and by name from the hub."""
