"""The estimators against the truth: synthetic gradients whose means and covariances are known.

Seeds are fixed, and every tolerance is 4 standard errors: of theory where a closed form exists, otherwise of the draws
themselves. ``pytest tests/gac/statistics -rP`` prints the figures that docs/statistics.md quotes.
"""
