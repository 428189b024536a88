"""How good the estimators and the laws are, against a truth from many independent steps at the same parameters.

``replicates`` computes the truth from the inner products of whole steps' gradients, ``panel`` runs the estimators side
by side, ``shadow`` runs the laws on what they say, ``trainer`` draws the steps without disturbing training, ``figures``
turns what was recorded into bias, standard errors, correlations and mean squared errors, ``picture`` draws it, ``run``
trains and leaves all of it in files. The command is ``gac audit``; `docs/audit.md` says what each number means.
"""
