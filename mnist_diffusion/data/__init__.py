"""Labelled images on their way to the network.

A source (`sources`, `idx`, `trees`) gives uint8 images or encoded ones, with labels; `dataset` decodes them, brings
them to one shape, holds a part out and draws batches; `transforms` augments them and maps them to [-1, 1]; `survey`
looks at a source before training.
"""
