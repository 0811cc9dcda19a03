"""The numbers that a run depends on: one folder for each scale, one file for each stage."""
