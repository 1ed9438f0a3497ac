import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Where a model is exported once for all tests of peers."""
    return tmp_path_factory.mktemp("exports")
