"""Verifiers: text and row in, verdict out."""
