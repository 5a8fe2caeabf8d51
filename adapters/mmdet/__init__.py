"""Hosts of MMDetection."""
