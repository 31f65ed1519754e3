"""Distil a trained pipeline into a student that samples in one network evaluation or a few.

    mnist-diffusion distill runs/my-run/pipeline --out runs/student                    # five minutes on a laptop
    mnist-diffusion distill user/name --data.source path/to/mnist --out runs/student   # a teacher from the Hub
    accelerate launch distill_cfg.py runs/my-run/pipeline --out runs/student           # several processes

Leaves `pipeline/` in its folder, like any other run: it is the same loop with another objective, in which the teacher
samples guided trajectories from noise to images, and the student learns to predict their ends from points on the way
(`mnist_diffusion/method/distillation.py`). `mnist_diffusion.training.run.distill` puts it together.
"""

from __future__ import annotations

import sys

from mnist_diffusion.cli.distill import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
