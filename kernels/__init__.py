"""Triton kernels, installed as ``resfast.kernels``. Import its modules only where Triton is."""
