"""Where the programs of laws run: in this process, on simulated ranks, or in a pool of processes."""
