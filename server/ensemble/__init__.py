"""Stable Diffusion XL's ensemble of experts: checkpoints, trajectories, prompts, previews, provenance."""
