"""Measuring generated images: an evaluator network, metrics, and the protocol around them."""
