"""Optimize a bundle's graphs and pack its weights for one machine."""
