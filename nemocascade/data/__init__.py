"""Turns conversations into packed rows of tokens."""
