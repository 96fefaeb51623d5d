"""The texts over which a model's quality is measured: those that ship, and a user's own.

prose.txt was written for this, and code.txt is a copy, kept as it is, of two files of the runtime: no model
that is older has learned them by heart, and they are the same on every machine.
"""
