"""What `VERL_USE_EXTERNAL_MODULES=gac_verl` has verl import in every process: its actors mix both losses from then on."""

from gac.trainers.adapters import verl

verl.install(law="gac")
