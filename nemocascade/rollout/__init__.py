"""Samples completions, judges them, and turns them into the rollouts that a step trains on."""
