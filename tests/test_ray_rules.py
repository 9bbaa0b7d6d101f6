"""Decisions made inside Ray Serve: how many replicas, and which one a connection goes to."""

from __future__ import annotations

import asyncio
from collections import namedtuple
from types import SimpleNamespace

import pytest

pytest.importorskip("ray", reason="needs Ray Serve: pip install -e '.[ray]'")

from streamdiff_core.ray_rules import SessionRouter, scale_by_load  # noqa: E402

Place = namedtuple("Place", "unique_id")


def context(loads, waiting=(), *, now=2):
    figures = {"load": dict(enumerate(loads)), "waiting": dict(enumerate(waiting))} if loads else {}
    return SimpleNamespace(aggregated_metrics=figures, current_num_replicas=now, target_num_replicas=now)


@pytest.mark.parametrize(
    ("loads", "waiting", "wanted"),
    [
        ([], [], 2),  # nobody has reported: as it is
        ([0.0, 0.0], [0, 0], 1),
        ([0.7, 0.69], [0, 0], 2),  # 1.39 over replicas of 0.7
        ([0.9, 0.6], [0, 0], 3),
        ([0.9, 0.9], [0, 2], 3),
        ([0.1, 0.1], [0, 1], 3),  # in line although the load is low: places are what is missing
    ],
)
def test_replicas_follow_the_load_and_the_line(loads, waiting, wanted):
    assert scale_by_load(context(loads, waiting)) == (wanted, {})


def test_a_named_session_goes_by_its_name_and_any_other_where_there_is_room():
    router = SessionRouter.__new__(SessionRouter)  # only its ring is needed, not a cluster
    places = [Place(name) for name in "xyz"]
    router._deployment_id, router._replicas = "engine", {place: place for place in places}
    router._num_virtual_nodes, router._num_fallback_replicas = 100, 2
    router._rebuild_ring(frozenset(places))

    def ranks(session_id):
        metadata = SimpleNamespace(session_id=session_id, internal_request_id="any")
        request = SimpleNamespace(metadata=metadata, routing_context=SimpleNamespace())
        return asyncio.run(router.choose_replicas(places, request))

    assert ranks("") == [places]  # one rank: Ray takes the one with the fewest requests under way
    firsts = {name: ranks(name)[0] for name in "abcdefgh"}
    assert all(len(rank) == 1 for rank in firsts.values()) and {r[0] for r in firsts.values()} == set(places)
    assert firsts == {name: ranks(name)[0] for name in "abcdefgh"}
