"""What training costs: tokens per second, floating-point operations, GPU memory, and space on the disk."""
