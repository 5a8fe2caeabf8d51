"""Adapters for detrex's hosts."""
