"""What runs on a user's own model, and whether it is right."""
