import socket

import pytest
import torch

from kexue.losses import info_nce, nt_xent
from losses.contrast_worker import batch, cases, one, worker


@pytest.mark.slow
def test_two_processes_with_their_own_rows_equal_one_process(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name in cases(None):
        value, grads = one(name, None, None)
        (a, a_grads), (b, b_grads) = first[0][name], second[0][name]
        if value.dim() == 0:
            torch.testing.assert_close((a, b), (value, value), msg=name)
        elif "views" in name:  # first views before second ones, on each process and in one
            joined = torch.cat([torch.cat([x.view(2, -1)[i] for x in (a, b)]) for i in (0, 1)])
            torch.testing.assert_close(joined, value, msg=name)
        else:
            torch.testing.assert_close(torch.cat([a, b]), value, msg=name)
        for left, right, whole in zip(a_grads, b_grads, grads, strict=True):
            torch.testing.assert_close(torch.cat([left, right]), whole, msg=name)
        assert any(whole.any() for whole in grads)
    q, k, *_ = batch()
    expected = info_nce(q[:6].half(), k[:6].half())
    torch.testing.assert_close((first[1], second[1]), (expected, expected))
    torch.testing.assert_close((first[2], second[2]), 2 * (nt_xent(q[:6], k[:6]),))
    assert first[3] == second[3]
    assert len(first[3]) == 2  # one row in all has no negative, on every process
