"""A run of the study, named."""

import dataclasses
from typing import Any


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

    @property
    def key(self) -> str:
        """Names the run; the same in every session."""
        arm = f"{self.method}:{self.setting}" if self.setting else self.method
        return f"{self.phase}/{self.task}/{self.size}/{arm}/lr{self.lr:g}/seed{self.seed}"

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Row":
        """The run that a record tells of."""
        return cls(**{field.name: record[field.name] for field in dataclasses.fields(cls)})
