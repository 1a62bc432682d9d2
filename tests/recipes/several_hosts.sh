#!/usr/bin/env bash
# torchrun on several hosts. On each of them, with its number (0 is the host of the address):
#   NODES=2 HEAD=10.0.0.1 IFNAME=eth0 ./several_hosts.sh 0 ddp.py
set -euo pipefail

export GLOO_SOCKET_IFNAME="${IFNAME:-eth0}" # the network the hosts share; gloo would guess
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export COMMLIB_POLICY="${COMMLIB_POLICY:-int8+ef}" # on all hosts the same, or every rank raises

torchrun --nnodes "$NODES" --node-rank "$1" --nproc-per-node "${PER_NODE:-1}" \
    --master-addr "$HEAD" --master-port "${PORT:-29500}" "${@:2}"
