"""Submit, watch and survive on Slurm: runs on a login node, without torch."""
