"""What a run's folder tells, as curves and as a page for people."""
