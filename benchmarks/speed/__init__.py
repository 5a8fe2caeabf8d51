"""How fast deployed models are: what runs them, and the report."""
