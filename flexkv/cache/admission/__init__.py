"""What gets a place on a tier, and what is loaded rather than computed."""
