"""How good answers and retrieval are, and whether a difference is more than noise."""
