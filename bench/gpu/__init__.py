"""What only a GPU can show: `python -m bench.gpu.check` and `python -m bench.gpu.bench`."""
