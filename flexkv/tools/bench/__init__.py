"""``flexkv bench``: measures parts of FlexKV, many beside a ceiling that is measured in the same run."""

from flexkv.tools.bench.command import main

__all__ = ["main"]
