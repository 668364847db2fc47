"""Tests which errors mean that another rank is gone."""

import pytest
from torch.distributed import DistBackendError, DistNetworkError, DistStoreError

from contnet.utils.failures import lost_contact

_WORK = "WorkNCCL(SeqNum=12, OpType=ALLREDUCE, NumelIn=1, NumelOut=1, Timeout(ms)=1860000)"
_TIMEOUT = f"[Rank 1] Watchdog caught collective operation timeout: {_WORK} ran for 1860042 ms"
_PLACE = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:93, "


@pytest.mark.parametrize(
    "error",
    [
        DistBackendError(_TIMEOUT),
        DistBackendError(f"NCCL communicator was aborted on rank 1. Original reason: {_TIMEOUT}"),
        DistBackendError("NCCL communicator was aborted after a previous error"),
        DistBackendError(
            f"{_PLACE}remote process exited or there was a network error, NCCL version 2.21.5\n"
            "ncclRemoteError: A call failed possibly due to a network error or a remote process "
            "exiting prematurely.\nLast error:\nsocketProgress: Connection closed by remote peer h"
        ),
        DistBackendError(
            f"{_PLACE}unhandled system error (run with NCCL_DEBUG=INFO for details)\n"
            "ncclSystemError: System call (e.g. socket, malloc) or external library call failed\n"
            "Last error:\nsocketPollConnect: connect to 10.0.0.2<41> returned Connection refused"
        ),
        DistBackendError(
            "[1] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d "
            "key-value store by key '0', but store->get('0') got error: wait timeout"
        ),
        RuntimeError(
            f"[Rank 1] Process group watchdog thread terminated with exception: {_TIMEOUT}"
        ),
        RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:41"),
        DistNetworkError("recvValue failed: Connection reset by peer"),
        DistStoreError("Socket Timeout"),
    ],
)
def test_another_rank_is_gone(error):
    assert lost_contact(error)


@pytest.mark.parametrize(
    "error",
    [
        DistBackendError(
            f"{_PLACE}invalid usage (run with NCCL_DEBUG=WARN for details)\nncclInvalidUsage: This "
            "usually reflects invalid usage of NCCL library.\nLast error:\n"
            "Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 50000"
        ),
        DistBackendError(
            f"{_PLACE}unhandled cuda error\nncclUnhandledCudaError: Call to CUDA function failed.\n"
            "Last error:\nCuda failure 2 'out of memory'"
        ),
        DistBackendError(
            f"{_PLACE}unhandled system error\nncclSystemError\nLast error:\nError while creating "
            "shared memory segment /dev/shm/nccl-x (size 4), error: No space left on device"
        ),
        RuntimeError("CUDA error: device-side assert triggered"),
        ConnectionRefusedError(111, "Connection refused"),  # an error of a download
    ],
)
def test_this_rank_has_failed_itself(error):
    assert not lost_contact(error)
