"""What the tests of the launchers share."""

import pytest
from stand_ins import StandIns


@pytest.fixture
def stand_ins(tmp_path):
  return StandIns(tmp_path / "bin")
