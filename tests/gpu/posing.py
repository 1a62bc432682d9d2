"""NCCL ranks on one GPU that pose as hosts; needs nothing but torch."""

from __future__ import annotations

import os

import torch


def one_gpu(rank: int) -> str:
    """The setup of a rank: groups that move tensors of both devices."""
    os.environ.update(
        GLOO_SOCKET_IFNAME="lo",
        NCCL_CUMEM_ENABLE="0",
        NCCL_DEBUG="WARN",
        NCCL_HOSTID=f"commlib{rank}",
        NCCL_IB_DISABLE="1",
        NCCL_NET="Socket",
        NCCL_NET_PLUGIN="none",
        NCCL_NVLS_ENABLE="0",
        NCCL_P2P_DISABLE="1",
        NCCL_SHM_DISABLE="1",
        NCCL_SOCKET_IFNAME="lo",
    )
    torch.cuda.set_device(0)
    return "cpu:gloo,cuda:nccl"
