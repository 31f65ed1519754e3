"""Labelled images: read a source, bring it to one shape, draw batches."""
