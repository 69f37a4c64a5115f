"""Measuring profiles: of a live endpoint, of vLLM in a child process, or composed from published operator tables."""

from kvsim.calibration.endpoint import Endpoint, EndpointError, HttpEndpoint
from kvsim.calibration.link import linked
from kvsim.calibration.local import LocalEndpoint
from kvsim.calibration.measure import CalibrationError, Facts, calibrate
from kvsim.calibration.plan import Plan, make_plan

__all__ = [
    "CalibrationError",
    "Endpoint",
    "EndpointError",
    "Facts",
    "HttpEndpoint",
    "LocalEndpoint",
    "Plan",
    "calibrate",
    "linked",
    "make_plan",
]
