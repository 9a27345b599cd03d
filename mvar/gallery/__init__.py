"""`mvar gallery`: draw from checkpoints in a browser. Only `page` knows the library that makes the page."""
