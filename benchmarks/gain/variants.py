"""The rows of the ablation: from a row's name to what wraps the host.

baseline                                the host as it is
twice                                   an RT-DETR of transformers that looks forward twice, as its authors' does
default                                 FDRConfig(): the best recipe known
paper                                   FDRConfig.paper(): the paper's, exactly
fdr                                     the default without union and DDF
fdr+go-lsd                              the default with both
fdr+go-lsd:num_bins=16,a=0.25           with other settings of FDRConfig
N=16   a=0.25,c=0.5   T=2               the paper's Table 4, short for paper:...
uniform   lqe   no-lqe                  the paper's with uniform bins, with or without LQE
taught                                  the default, which learns from a teacher (--teacher) as well

The rows of the retrofit, where the host is a trained one, with settings behind a colon as well:

baseline                                the host trained on
twice                                   the same, looking forward twice
wrapped                                 the default, its FDR head fresh
calibrated                              the default, its FDR head calibrated before the first step
head                                    the same, and nothing but the FDR head is trained
taught                                  calibrated, and learns from a teacher as well
"""

from __future__ import annotations

import json
from typing import Any

from dfine_plugin.config import FDRConfig

BASELINE = "baseline"
TWICE = "twice"
_BARE = (BASELINE, TWICE)
DEFAULT_VARIANTS = f"{BASELINE} default"

_PAPER = {key: value for key, value in FDRConfig.paper().to_dict().items() if key != "version"}
_NAMED: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": _PAPER,
    "fdr": {"union": False, "ddf": False},
    "fdr+go-lsd": {"union": True, "ddf": True},
    "uniform": {**_PAPER, "weighting": "uniform"},
    "lqe": {**_PAPER, "lqe": True},
    "no-lqe": {**_PAPER, "lqe": False},
    "taught": {},
}
_RETROFIT: dict[str, dict[str, Any]] = {"wrapped": {}, "calibrated": {}, "head": {"trainable": "head"}, "taught": {}}
_CALIBRATED = ("calibrated", "head", "taught")
_SHORT = {"N": "num_bins", "T": "temperature"}


def parse_variants(text: str, retrofit: bool = False) -> list[str]:
    """The rows in `text`, parted by blanks or semicolons (commas part the settings within a row), checked, in order."""
    rows = list(dict.fromkeys(text.replace(";", " ").split()))
    for row in rows:
        known, others = (_RETROFIT, _NAMED) if retrofit else (_NAMED, _RETROFIT)
        name = row.partition(":")[0]
        if row not in _BARE and name not in known and (retrofit or name in others):
            raise ValueError(f"{row!r} is no row of this comparison: {', '.join([*_BARE, *known])}")
        settings = fdr_settings(row)
        if settings is not None:
            FDRConfig.from_dict(settings)
    return rows


def is_calibrated(row: str) -> bool:
    """Whether a row of the retrofit calibrates the FDR head before it trains."""
    return row.partition(":")[0] in _CALIBRATED


def is_taught(row: str) -> bool:
    """Whether a row learns from a teacher."""
    return row.partition(":")[0] == "taught"


def fdr_settings(row: str) -> dict[str, Any] | None:
    """The keyword arguments of FDRConfig that `row` stands for; None for a bare host."""
    if row in _BARE:
        return None
    name, _, settings = row.partition(":")
    if not settings and "=" in name:
        name, settings = "paper", name
    named = _NAMED | _RETROFIT
    if name not in named:
        raise ValueError(f"unknown variant {row!r}: {', '.join([*_BARE, *_NAMED])} or settings such as N=16")
    result = dict(named[name])
    for setting in filter(None, settings.split(",")):
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"variant {row!r}: {setting!r} is not of the form name=value")
        result[_SHORT.get(key, key)] = _value(value)
    return result


def _value(text: str) -> Any:
    """A number, true or false as JSON has them; anything else is a word."""
    try:
        return json.loads(text.lower())
    except json.JSONDecodeError:
        return text
