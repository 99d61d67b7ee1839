"""Which response a name stands for, and all of this package's own."""

from __future__ import annotations

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.response.base import NoResponse, Response
from lightning_muter.curvature.response.l2 import L2Response
from lightning_muter.curvature.response.linf import LinfResponse
from lightning_muter.curvature.response.unconstrained import Unconstrained
from lightning_muter.errors import ArgumentError

__all__ = ["L2Response", "LinfResponse", "NoResponse", "Response", "Unconstrained", "as_response"]


def as_response(response: str | Response, threat: ThreatModel) -> Response:
    """The response a name stands for; "auto" is the constraint-aware one of the threat model.

    Raises:
        ArgumentError: unknown name, or one of another norm than the threat model's.
    """
    chosen: Response
    if isinstance(response, Response):
        chosen = response
    else:
        chosen = Response.named(threat.ball.response if response == "auto" else response)()
    if chosen.norm not in (None, threat.norm):
        raise ArgumentError(
            "response", chosen.name, f"'{threat.norm}' for this threat model", "Use 'auto', or change the threat model."
        )
    return NoResponse() if threat.eps == 0 and chosen.norm is not None else chosen
