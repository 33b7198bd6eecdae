"""What processes say to each other: messages, sockets and rings, with their versions and limits."""
