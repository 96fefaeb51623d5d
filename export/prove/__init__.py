"""Certificates: a validation bound to the files that it was of, and the same proof of graphs of others."""
