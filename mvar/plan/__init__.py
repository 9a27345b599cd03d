"""`mvar plan`: what a training needs before it is started. Pure arithmetic, held against measurement by tests."""
