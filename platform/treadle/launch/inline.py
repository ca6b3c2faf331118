"""One rank beside the driver, without Ray."""

from __future__ import annotations

import subprocess
from typing import Any

from treadle.launch.agent import Orders, start_agent
from treadle.launch.lead import Lead

__all__ = ["train_inline"]

HOST = "127.0.0.1"


def train_inline(lead: Lead) -> dict[str, Any]:
    """Train with one rank; returns its summary.

    Raises:
        TreadleError: what ended the run.
    """
    agents: list[subprocess.Popen[bytes]] = []
    controller = lead.controller(HOST, on_agent_lost=lambda rank: agents.append(start_agent(orders)))
    orders = Orders(**lead.orders(controller), rank=0, world=1, node=HOST)
    agents.append(start_agent(orders))
    try:
        controller.run(agents_alive=lambda: agents[-1].poll() is None)
    finally:
        for agent in agents:
            assert agent.stdin is not None
            agent.stdin.close()
            agent.wait()
    return controller.outcome()
