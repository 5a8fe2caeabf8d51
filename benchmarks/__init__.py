"""Benchmarks of the plugin: what it brings (ablation, retrofit, robustness) and what it costs (overhead, latency)."""

from importlib.util import find_spec

from dfine_plugin.tools.installing import install_hint

if missing := [name for name in ("rich", "typer") if find_spec(name) is None]:
    raise ImportError(f"the benchmarks need {' and '.join(missing)}: {install_hint('bench')}")
