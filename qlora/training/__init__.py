"""Rows of a dataset, and the run that trains on them."""
