"""Adapters for Hugging Face transformers' hosts."""
