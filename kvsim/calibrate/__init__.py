"""Measuring profiles: of a live endpoint, of vLLM in a child process, or composed from published operator tables."""

from kvsim.calibrate.endpoint import Endpoint, EndpointError, HttpEndpoint
from kvsim.calibrate.local import LocalEndpoint
from kvsim.calibrate.measure import CalibrationError, Facts, calibrate
from kvsim.calibrate.plan import Plan, make_plan

__all__ = [
    "CalibrationError",
    "Endpoint",
    "EndpointError",
    "Facts",
    "HttpEndpoint",
    "LocalEndpoint",
    "Plan",
    "calibrate",
    "make_plan",
]
