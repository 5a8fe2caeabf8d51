"""What the wrap brings: runs of training, their evaluation and diagnosis, reports."""
