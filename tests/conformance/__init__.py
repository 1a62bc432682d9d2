"""PyTorch's own conformance suite, run against backend `commlib` and, to compare, against gloo.

    python -m tests.conformance                                 both, compared; `make conformance`
    python -m tests.conformance -k NAME --backend commlib -s    one test, its output as it comes

The suite is the one torch installs, `torch/testing/_internal/distributed/distributed_test.py`: its
text is neither copied nor changed. It needs the packages of the extra `conformance`.
"""
