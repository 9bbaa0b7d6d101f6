"""A forked row goes on exactly as its source, and neither disturbs the other: all that a policy remembers is copied."""

import pytest
from policy_script import Feed, new_cache, policy_of, run, singles
from torch.testing import assert_close

from streamdiff_core.kv_policies import POLICIES

KNOBS = {
    "anchor_forcing": {"pinned_frames": 2},
    "forcing_kv": {"dynamic_heads": [[], [1], [0]], "retention": 0.5},
    "frame_routing": {"bank_frames": 5, "read_frames": 2},
    "slow_fast": {"slow_frames": 2, "threshold": 0.5, "every_chunks": 1},
    "temp_cache": {"threshold": 0.1},
}


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_fork(name):
    feed, other = Feed(), Feed(seed=77)
    policy = policy_of(name, 1, 4, **KNOBS.get(name, {}))
    cache = new_cache(policy, num_rows=2)
    switches = {3: "cut"} if "cut" in policy.switches else {3: "keep"}
    run(policy, singles(0, 8), feed, cache=cache, switches=switches)
    size = cache.nbytes
    cache.fork(0, (1,))
    assert cache.describe(1) == cache.describe(0)
    first = run(policy, singles(9, 12), feed, cache=cache, row=0)
    run(policy, singles(13, 20), other, cache=cache, row=0)
    assert_close(run(policy, singles(9, 12), feed, cache=cache, row=1), first, rtol=0, atol=0)
    alone = new_cache(policy, num_rows=2)
    run(policy, singles(0, 8), feed, cache=alone, switches=switches, row=1)
    assert_close(run(policy, singles(9, 12), feed, cache=alone, row=1), first, rtol=0, atol=1e-12)
    assert cache.nbytes - size <= size - new_cache(policy, num_rows=2).nbytes  # row 1 has what row 0 had, no more
