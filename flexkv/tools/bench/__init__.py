"""``flexkv bench``: what the control plane costs, beside a ceiling measured in the same run."""

from flexkv.tools.bench.command import main

__all__ = ["main"]
