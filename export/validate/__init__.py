"""The proof: a bundle's files against PyTorch, and what its weights cost."""
