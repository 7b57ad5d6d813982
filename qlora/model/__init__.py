"""The base model in 4-bit, its layers, and the adapter on it."""
