"""Hosts to compare: small, at full size, initialised as their authors do."""
