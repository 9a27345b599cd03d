"""Drawing codes from a trained model."""
