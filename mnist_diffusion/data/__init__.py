"""Labelled images: read, decode, split, batch, transform.

A source (`sources`, `idx`, `trees`) returns labelled images, uint8 or still encoded. `dataset` decodes them to one
shape, splits off held-out images and draws batches; `transforms` augments batches and scales them to [-1, 1]; `survey`
inspects a source before training.
"""
