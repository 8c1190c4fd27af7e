"""From images to a packed store of what a VAE makes of them, by any number of processes."""
