"""The diffusion model: network, noising process, objectives, samplers, pipeline."""
