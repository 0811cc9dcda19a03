"""Each file holds a reference definition, fast forms with the same signature, and their gradients."""
