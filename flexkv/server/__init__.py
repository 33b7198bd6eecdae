"""How an engine gets its controller; and upstream's import path of the client that a rank uses."""
