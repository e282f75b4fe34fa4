"""How a device computes: choosing and preparing it, compiling, batches on a CPU, transfers, several processes."""
