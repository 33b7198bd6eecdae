"""Protocols between processes: messages, sockets and rings, with their versions and limits."""
