"""Home of the Triton kernels, installed as ``resfast.kernels``. There are none yet."""
