"""The published scale: Nemotron-3-Nano-30B-A3B."""
