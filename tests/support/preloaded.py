"""Everything a run imports, for the process that runs are forked from; no torch operation may run here."""

import accelerate
import datasets  # noqa: F401
import mnist_diffusion.denoising
import mnist_diffusion.distillation
import sklearn.datasets
import sklearn.model_selection

import mnist_diffusion.distill_cfg
import mnist_diffusion.training
import train_cfg  # noqa: F401

assert accelerate
assert sklearn.datasets
assert mnist_diffusion.denoising
assert mnist_diffusion.distillation
assert mnist_diffusion.distill_cfg
assert mnist_diffusion.training
