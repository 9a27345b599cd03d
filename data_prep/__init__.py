"""Offline tokenization: image sources -> code store. One module per step of the job."""
