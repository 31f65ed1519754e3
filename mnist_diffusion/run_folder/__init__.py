"""The folder of one training run: who holds it, its metrics and checkpoints, and reading it back."""
