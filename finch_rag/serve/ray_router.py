"""How Ray Serve chooses the replica of a request: the one whose stores and documents are warm."""

from __future__ import annotations

import random
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from .affinity import names_store, ranked

KEY, TURN = "key", "turn"  # arguments of a request that are read here


class AffinityRouter(RequestRouter):
    """Sends requests of one key to one replica, as long as there are the same replicas.

    Where it is busy, documents go to the next one; a store waits for its own, as no other can have it open. A request
    without a key goes to any of the least busy. ``turn`` counts how often a request was tried: each turn begins one
    replica further on.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Replicas to ask, by falling preference.

        Args:
            candidate_replicas: All that there are.
            pending_request: The request.
        """
        arguments: dict[str, Any] = {} if pending_request is None else pending_request.kwargs
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        key, turn = str(arguments.get(KEY, "")), int(arguments.get(TURN, 0))
        if not candidate_replicas:
            return []
        if not key:
            return [random.sample(candidate_replicas, len(candidate_replicas))]
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        order = ranked(key, list(by_name))
        begin = turn % len(order)
        order = order[begin:] + order[:begin]
        return [[by_name[name]] for name in (order[:1] if names_store(key) else order)]
