"""Images with their truths: made in memory, or read from a folder."""
