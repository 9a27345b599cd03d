"""Class folders of images out of packages, for demos and tests."""
