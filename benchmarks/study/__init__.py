"""The study: GAC against its baselines on verifiable tasks. ``python -m benchmarks.study --help``; docs/study.md."""


class UsageError(Exception):
    """A mistake of the user: printed as one line, exit code 2."""
