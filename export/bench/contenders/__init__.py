"""One file a runtime that takes part in a benchmark, and how the others are installed."""
