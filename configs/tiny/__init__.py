"""The tiny scale: the whole recipe in minutes on two CPU cores."""
