"""The daemon, and how an engine gets its controller; upstream's import path of the client that a rank uses."""
