"""D-FINE box regression for existing DETRs."""
