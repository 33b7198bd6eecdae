"""Reads and writes of files: the I/O queue, slot records, checksums."""
