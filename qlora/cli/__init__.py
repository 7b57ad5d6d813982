"""Commands and flags."""
