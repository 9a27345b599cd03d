"""Codes on disk, and the batches that they become."""
