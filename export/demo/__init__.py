"""The demo checkpoints that ship, the texts and pictures they learned, and their training."""
