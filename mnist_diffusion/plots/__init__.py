"""Plots: image grids, curves, sample sheets, and the HTML page of a run."""
