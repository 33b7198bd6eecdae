"""What moves blocks, one executor a kind of route."""
