"""Figures that compare samples with real images."""

EVALUATIONS = "evaluations.jsonl"
"""In a run's folder: a flat object for each evaluation of its samples."""
