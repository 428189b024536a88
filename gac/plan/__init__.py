"""Costs beforehand: what measuring costs on a device, and how sure mu will be."""

from gac.plan.plan import (
    DEVICES,
    DTYPES,
    ESTIMATORS,
    METRICS,
    SHARDINGS,
    Device,
    MuError,
    Noise,
    Parameters,
    Plan,
    Setup,
    make_plan,
    mu_error,
    workspace_bytes,
)

__all__ = [
    "DEVICES",
    "DTYPES",
    "ESTIMATORS",
    "METRICS",
    "SHARDINGS",
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
