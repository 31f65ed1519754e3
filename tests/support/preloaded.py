"""Everything a run imports, for the process that runs are forked from; no torch operation may run here."""

import accelerate  # noqa: F401
import datasets  # noqa: F401
import sklearn.datasets
import sklearn.model_selection  # noqa: F401

import distill_cfg  # noqa: F401
import mnist_diffusion.training.run  # noqa: F401
import train_cfg  # noqa: F401
