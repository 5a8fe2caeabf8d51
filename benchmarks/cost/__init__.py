"""What the wrap costs in training: steps of the criterion and of whole models, timed."""
