"""How to add what an extra brings to this installation."""

import json
from importlib.metadata import distributions
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname


def install_hint(extra: str) -> str:
    """The command that installs this package again with an extra, from where it came: it is on no index."""
    # a build leaves metadata in its checkout, which come first where the checkout is on the path
    found = [installed.read_text("direct_url.json") for installed in distributions(name="dfine-plugin")]
    if not found:  # imported from its checkout
        return f"pip install '{Path(__file__).resolve().parents[2]}[{extra}]'"
    source = next(filter(None, found), None)
    if source is None:
        return f"pip install 'dfine-plugin[{extra}]'"
    origin = json.loads(source)
    if "dir_info" in origin:
        editable = "-e " if origin["dir_info"].get("editable") else ""
        return f"pip install {editable}'{url2pathname(urlparse(origin['url']).path)}[{extra}]'"
    prefix = f"{origin['vcs_info']['vcs']}+" if "vcs_info" in origin else ""
    return f"pip install 'dfine-plugin[{extra}] @ {prefix}{origin['url']}'"
