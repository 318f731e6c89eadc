"""The operator in Triton: the kernels of backend "triton". Imported only where that backend was chosen."""
