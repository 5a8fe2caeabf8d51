"""For the API pages: docstrings as mkdocstrings reads them."""

import re
from typing import Any

import griffe


class DocstringRoles(griffe.Extension):
    """Leaves of Sphinx's roles, such as :class:`FDRConfig`, the name that they show, and of `::` before what is literal
    a colon; one example is a section, too."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r":\w+:`(?:~[\w.]+\.)?([\w.]+)`", r"`\1`", obj.docstring.value)
            text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
