"""`python -m mnist_diffusion`: the console command."""

import sys

from mnist_diffusion.cli import main

sys.exit(main())
