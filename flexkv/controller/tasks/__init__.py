"""Tasks of ``KVManager``: one get or put each, from match to result."""
