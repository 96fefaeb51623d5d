"""Make a bundle, simplify it again, look into it."""
