"""The command that an error tells to run: it depends on where the package came from."""

import json
from pathlib import Path
from typing import Any

import pytest

from dfine_plugin.tools import installing

ROOT = Path(installing.__file__).parents[2]


class Distribution:
    """What pip has noted of where a package came from (PEP 610)."""

    def __init__(self, origin: Any) -> None:
        self.origin = origin

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return None if self.origin is None else json.dumps(self.origin)


def installed(monkeypatch: pytest.MonkeyPatch, *origins: Any) -> None:
    monkeypatch.setattr(installing, "distributions", lambda name: map(Distribution, origins))


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (None, "pip install 'dfine-plugin[export]'"),
        ({"url": "file:///home/me/d%20f", "dir_info": {}}, "pip install '/home/me/d f[export]'"),
        ({"url": "file:///home/me/d", "dir_info": {"editable": True}}, "pip install -e '/home/me/d[export]'"),
        (
            {"url": "https://example.org/d.git", "vcs_info": {"vcs": "git", "commit_id": "1f"}},
            "pip install 'dfine-plugin[export] @ git+https://example.org/d.git'",
        ),
        (
            {"url": "https://example.org/d.whl", "archive_info": {}},
            "pip install 'dfine-plugin[export] @ https://example.org/d.whl'",
        ),
    ],
    ids=["index", "checkout", "editable", "git", "wheel"],
)
def test_extras_come_from_where_the_package_came(origin: Any, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, origin)
    assert installing.install_hint("export") == command


def test_what_a_build_left_in_the_checkout_hides_no_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, None, {"url": "file:///home/me/d", "dir_info": {}})
    assert installing.install_hint("export") == "pip install '/home/me/d[export]'"


def test_a_checkout_that_is_not_installed_is_installed_from(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    assert installing.install_hint("bench,export") == f"pip install '{ROOT}[bench,export]'"
