"""How a search ranks passages, for every store."""

MODES = ("dense", "lexical", "hybrid")
DEFAULT_MODE = "hybrid"  # the best of the three on both question sets it was measured on (docs/measurements.md)
FETCH = 50  # passages that each leg ranks
