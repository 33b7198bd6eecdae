"""Tasks of a controller: one get or put each, from match to result."""
