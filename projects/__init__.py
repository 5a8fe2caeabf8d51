"""LazyConfigs for detrex's trainer, and what they are made with; installed as ``dfine_plugin.projects``.

Where the checkout itself is on the path, this folder meets detrex's own ``projects`` by name: the two then share it.
"""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)
