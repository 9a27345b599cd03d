"""Figures that compare samples with real images."""
