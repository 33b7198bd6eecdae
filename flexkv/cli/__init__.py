"""The command ``flexkv``, one file a command."""
