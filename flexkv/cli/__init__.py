"""The command ``flexkv`` and its small subcommands; the larger ones are in ``flexkv.tools``."""
