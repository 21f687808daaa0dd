"""Ours against the peers: the same work, in one run, interleaved, in CPU time."""
