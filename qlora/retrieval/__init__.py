"""Documents as passages in a store, and how they are found."""
