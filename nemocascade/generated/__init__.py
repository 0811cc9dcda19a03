"""Rows and demonstrations made by a program, for the tiny scale: one file a domain."""
