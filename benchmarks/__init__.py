"""Benchmarks of the plugin: ablation, overhead, latency."""
