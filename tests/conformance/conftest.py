from ..scripts.conftest import tokenizers  # noqa: F401 - a fixture
