"""The example of accelerate: its command on two processes, and FSDP2 as its configuration asks for it."""

from __future__ import annotations

import re

import pytest

from tests.examples.scripts import EXAMPLES, ROOT, output_of

FOLDER = EXAMPLES / "accelerate_fsdp2"
SECONDS = 120


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What two processes print under the example's command, as it stands and once more with FSDP2."""
    folder = tmp_path_factory.mktemp("ranks")
    options = ["--config_file", FOLDER / "fsdp2.yaml", "--main_process_port", 0]
    script = [ROOT / "tests" / "examples" / "sharded_on_cpus.py", folder / "store", FOLDER / "train.py", "--steps", 3]
    return output_of("accelerate.commands.launch", *options, *script, folder=folder, seconds=SECONDS)


@pytest.mark.timeout(SECONDS + 30)
@pytest.mark.parametrize(
    ("begin", "end"), [("MULTI_CPU on 2", "FSDP2 on 2"), ("FSDP2 on 2", None)], ids=["ddp", "fsdp2"]
)
def test_both_ranks_have_one_mu(output, begin, end):
    assert begin in output, output
    part = output[output.index(begin) :]
    part = part[: part.index(end)] if end else part
    mus = dict(re.findall(r"step 3, rank (\d): mu (0\.\d+)", part))
    assert set(mus) == {"0", "1"}, part
    assert mus["0"] == mus["1"]


def test_each_block_is_a_unit(output):
    """That is: the class that the configuration names is one of the script's."""
    assert re.findall(r"units of FSDP2: (.*)", output) == ["FSDPBlock FSDPBlock FSDPModel"] * 2, output
