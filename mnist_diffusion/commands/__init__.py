"""The verbs of `mnist-diffusion`, a module each: its arguments, and `main`, which carries them out."""
