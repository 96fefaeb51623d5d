"""The benchmark: a bundle and other runtimes, each in a process of its own, in turns. Runs without torch."""
