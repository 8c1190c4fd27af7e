"""The transformer, and the VAE that its latents come from."""
