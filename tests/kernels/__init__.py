"""The kernels, each against its reference: interpreted where there is no CUDA device, compiled where there is one."""
