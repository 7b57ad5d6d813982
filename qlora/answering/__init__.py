"""Answers from passages: the model that writes them, and what they cite."""
