"""Train a class-conditional diffusion model with classifier-free guidance.

    accelerate launch train_cfg.py                                       # the default recipe: five minutes on a laptop
    accelerate launch train_cfg.py --data.source path/to/mnist           # on a folder of IDX files, or of images
    accelerate launch train_cfg.py --config tiny --train.max_steps 100   # another recipe, shortened
    accelerate launch train_cfg.py --help                                # every option and what it means

Leaves `runs/<recipe>-<time>/pipeline`, a folder that `DiffusionPipeline.from_pretrained` loads.

The network and its objective are chosen at the bottom. Both can be replaced by functions of your own with the
same arguments. Everything else (images, order, precision, processes, checkpoints, export) is the configuration's, and
`mnist_diffusion.training.run.train` puts it together in the order in which it happens.
"""

from __future__ import annotations

import sys

from mnist_diffusion.cli.train import main
from mnist_diffusion.method.network import build_unet
from mnist_diffusion.method.objective import diffusion_objective

__all__ = ["main"]

if __name__ == "__main__":
    # A UNet2DModel with a class embedding; its last class, the null class, stands for "any class".
    # It learns to predict the velocity (or the noise, or the image) of noisy images: mix a training image and noise at
    # a random timestep, drop the label now and then, predict, and minimise the weighted squared error.
    sys.exit(main(network=build_unet, objective=diffusion_objective))
