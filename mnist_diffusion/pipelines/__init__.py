"""Pipelines that travel inside every export; each is one self-contained file."""
