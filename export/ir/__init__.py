"""Passes over a traced graph: node names, weights taken out, simplification."""
