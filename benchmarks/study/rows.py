"""A run of the study, named."""

import dataclasses
from typing import Any

from benchmarks.study.regimes import CLEAN


@dataclasses.dataclass(frozen=True)
class Row:
    """One run."""

    phase: str
    task: str
    size: str
    method: str
    setting: str
    lr: float
    seed: int
    regime: str = CLEAN

    @property
    def key(self) -> str:
        """Names the run; the same in every session."""
        arm = f"{self.method}:{self.setting}" if self.setting else self.method
        regime = "" if self.regime == CLEAN else f"/{self.regime}"
        return f"{self.phase}/{self.task}/{self.size}/{arm}/lr{self.lr:g}/seed{self.seed}{regime}"

    @property
    def fields(self) -> dict[str, Any]:
        """Its part of a record; records of the clean regime do not name it."""
        return {name: value for name, value in vars(self).items() if name != "regime" or value != CLEAN}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Row":
        """The run that a record tells of."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: record[name] for name in names if name != "regime" or name in record})
