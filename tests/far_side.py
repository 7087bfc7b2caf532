"""The far side: a process in which this package cannot be imported, and which makes sure of it."""

# What it runs first.
WITHOUT_PACKAGE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "shared_bert":
            raise ModuleNotFoundError("blocked", name=name)

sys.meta_path.insert(0, Blocker())
try:
    import shared_bert
except ModuleNotFoundError as error:
    assert str(error) == "blocked"
else:
    raise AssertionError("shared_bert can be imported")
"""
