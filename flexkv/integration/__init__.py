"""Adapters to inference engines, one folder each."""
