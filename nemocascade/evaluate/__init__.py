"""Held-out scores and their intervals."""
