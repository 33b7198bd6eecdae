"""The SSD tier: data files and slot tables in one or more directories."""
