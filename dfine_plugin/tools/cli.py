"""The command ``dfine-plugin``."""

from .installing import install_hint


def main() -> None:
    """Run it; where what it needs is not installed, say which extra to install."""
    try:
        from .commands import app

        app()
    except ModuleNotFoundError as error:
        raise SystemExit(f"dfine-plugin: {error}; {install_hint('export')}") from error
    except ImportError as error:
        raise SystemExit(f"dfine-plugin: {error}") from error
