"""Set before Ray is imported: every test cluster is private, unauthenticated on loopback, and silent."""

import os
import sys
import tempfile
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile("any machine", deadline=None)  # no test asserts wall-clock
hypothesis.settings.load_profile("any machine")

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_AUTH_TOKEN_PATH"] = str(Path(tempfile.gettempdir()) / f"ray-token-{os.getpid()}")
os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # two busy cores start processes slowly
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HEAL_HOME"] = tempfile.mkdtemp(prefix="heal-home-")

sys.path.insert(0, str(Path(__file__).parent))  # tests share `tiny`

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The CIFAR-10 drift data beside the checkout; skips where it is absent."""
    if not (SHARED_DATA / "model.yaml").exists():
        pytest.skip(f"no CIFAR-10 drift data at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The spec of a small trained model."""
    import tiny

    return tiny.prepare(tmp_path_factory.mktemp("stripes"))
