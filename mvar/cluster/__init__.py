"""Around a Slurm job: may it train, what after it, and the code it runs."""
