"""Bundles for other runtimes: their files, a driver in their language, and golden.json run through it.

A runtime is a module of this folder with a `RUNTIME`, which `runtimes.py` describes.
"""
