"""Costs beforehand: what measuring costs on a device, and how sure mu will be."""

from gac.plan.device import DEVICES, LATENCY, Device
from gac.plan.error import MuError, Noise, mu_error
from gac.plan.parameters import Parameters
from gac.plan.plan import Plan, make_plan
from gac.plan.setup import DTYPES, ESTIMATORS, METRICS, SHARDINGS, Setup
from gac.plan.traffic import ABSORB_LAUNCHES, HOOK_SECONDS, SKETCH_LAUNCHES, STEP_OPERATIONS, workspace_bytes

__all__ = [
    "ABSORB_LAUNCHES",
    "DEVICES",
    "DTYPES",
    "ESTIMATORS",
    "HOOK_SECONDS",
    "LATENCY",
    "METRICS",
    "SHARDINGS",
    "SKETCH_LAUNCHES",
    "STEP_OPERATIONS",
    "Device",
    "MuError",
    "Noise",
    "Parameters",
    "Plan",
    "Setup",
    "make_plan",
    "mu_error",
    "workspace_bytes",
]
