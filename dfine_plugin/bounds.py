"""Bounds of the numbers that a user chooses."""

import sys

MOST_BINS = 1024
"""A thousand times the work of a host's box head; a stranger's settings may ask for any number."""
LEAST_OFFSET, MOST_OFFSET = 1e-4, 1e3
"""In sides of a box: within these, all bins of W are apart in float32."""


def check_number(name: str, value: float, *, above: float | None = None, least: float | None = None) -> None:
    """Raise ``ValueError`` if ``value`` is no finite number, or breaks the bound that is given."""
    bound = f"above {above}" if above is not None else f"of at least {least}"
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if not is_number or (above is not None and value <= above) or (least is not None and value < least):
        raise ValueError(f"{name} must be a finite number {bound}, got {value!r}")


def check_bins(num_bins: int, a: float, c: float) -> None:
    """Raise ``ValueError`` with the bound that ``num_bins``, ``a`` or ``c`` breaks."""
    if isinstance(num_bins, bool) or not isinstance(num_bins, int) or num_bins < 4 or num_bins % 2:
        raise ValueError(f"num_bins must be an even integer of at least 4, got {num_bins!r}")
    if num_bins > MOST_BINS:
        raise ValueError(f"num_bins must be at most {MOST_BINS}, got {num_bins!r}")
    for name, value in (("a", a), ("c", c)):
        check_number(name, value, above=0)
        if not LEAST_OFFSET <= value <= MOST_OFFSET:
            raise ValueError(f"{name} must lie in [{LEAST_OFFSET}, {MOST_OFFSET}], got {value!r}")
