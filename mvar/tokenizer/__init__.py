"""The multi-scale VQ-VAE."""
