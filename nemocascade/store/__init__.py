"""What is on disk: checkpoints, their sums, Hugging Face folders, the record of a cascade."""
