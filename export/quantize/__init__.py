"""Weights of few bits: rounded, packed, and put into a graph."""
