"""verl imports this in every process under `VERL_USE_EXTERNAL_MODULES=gac_verl`: then its actors mix both losses."""

from gac.trainers.adapters import verl

verl.install(law="gac")
