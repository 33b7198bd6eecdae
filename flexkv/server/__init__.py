"""What runs in other processes than the controller."""
