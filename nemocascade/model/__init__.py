"""The hybrid model of Mamba-2, attention and mixture-of-experts blocks."""
