"""Pictures: grids of images, plots of numbers, and what pipelines draw."""
