"""What CUDA must do as the CPU does: `pytest -m gpu` runs these bodies on a GPU, in one process, and the rest of the suite on the
CPU, so that nothing but the device is new there."""
