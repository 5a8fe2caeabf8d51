"""Where :func:`fdr_head_of` was before the adapters were parted by library."""

from .transformers.d_fine import fdr_head_of

__all__ = ["fdr_head_of"]
