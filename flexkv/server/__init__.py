"""Upstream's import path of the client that a rank uses."""
